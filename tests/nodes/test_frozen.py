"""Frozen layers beside torch's own: the same numbers and gradients, the host's own weights, and little memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lcm_core.networks.lora_layers import add_lora
from nodes.frozen import copy_sharing_weights, freeze, layers_of, weights_of
from trainer.memory import rehearsal

CPU = torch.device("cpu")
FLOAT8 = torch.float8_e4m3fn


class Block(nn.Module):
    """A block of a diffusion transformer: modulation, attention and a perceptron; everything but its norm is frozen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.modulation = nn.LayerNorm(width), nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """(B, L, W) and (B, W)."""
        shift, scale, gate, *others = self.modulation(vec)[:, None].chunk(6, -1)
        heads = [part.unflatten(-1, (-1, 32)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1)]
        attended = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + gate * self.out(attended * (1 + scale) + shift)
        return x + others[0] * self.down(nn.functional.gelu(self.up(self.norm(x) * (1 + others[1]) + others[2])))


class Blocks(nn.Module):
    """Some of them."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """(B, L, W) and (B, W)."""
        for block in self.blocks:
            x = block(x, vec)
        return x


def gradients(network: nn.Module, dtype: torch.dtype, side: int) -> list[Tensor]:
    """Of a LoRA on all layers, at the same place and with the same first weights."""
    torch.manual_seed(0)
    adapters = add_lora(network, 4, target_modules=tuple(layers_of(network)))
    for layer in adapters.layers.values():
        nn.init.normal_(layer.up.weight, std=0.02)
    x = torch.randn(2, 16, side, generator=torch.Generator().manual_seed(1)).to(dtype)
    network(x, x[:, 0]).float().square().mean().backward()
    return [half.weight.grad for layer in adapters.layers.values() for half in layer.halves()]


@pytest.mark.parametrize("resident", [True, False])
def test_gradients_are_torchs_own(resident: bool) -> None:
    """Through weights that came to be in inference mode, as a host's do, and that no gradient may reach otherwise."""
    torch.manual_seed(5)
    with torch.inference_mode():
        host = Blocks(64, 2)
    copied = copy_sharing_weights(host)
    plain = Blocks(64, 2)
    plain.load_state_dict({name: value.clone() for name, value in host.state_dict().items()})
    freeze(copied, CPU, torch.float32, resident)
    found, expected = (gradients(network, torch.float32, 64) for network in (copied, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensor"):
        gradients(host, torch.float32, 64)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_any_dimension(dims: int) -> None:
    """With strides, padding, dilation and a LoRA."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    plain = nn.Sequential(kind(3, 6, 1), kind(6, 4, 3, stride=2, padding=1), kind(4, 5, 3, padding=2, dilation=2))
    copied = copy_sharing_weights(plain)
    freeze(copied, CPU, torch.float32)
    results = []
    for network in (copied, plain):
        torch.manual_seed(0)
        adapters = add_lora(network, 2, target_modules=("0", "1", "2"))
        for layer in adapters.layers.values():
            nn.init.normal_(layer.up.weight)
        x = torch.randn(2, 3, *[9] * dims, generator=torch.Generator().manual_seed(1))
        output = network(x)
        output.square().mean().backward()
        results.append([output, *(half.weight.grad for layer in adapters.layers.values() for half in layer.halves())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_are_the_hosts_own_and_stay_as_they_are() -> None:
    """Nothing large is copied; 8-bit floats keep their format; moving the copy moves no frozen weight."""
    host = Blocks(64, 1)
    host.blocks[0].up.to(FLOAT8)
    copied = copy_sharing_weights(host)
    shared = {weight.data_ptr() for weight in host.parameters()}
    assert all(layer.weight.data_ptr() in shared for layer in layers_of(copied).values())
    assert copied.blocks[0].norm.weight.data_ptr() not in shared
    freeze(copied, CPU, torch.bfloat16)
    assert copied.blocks[0].up.weight.dtype == FLOAT8
    assert copied.blocks[0].down.weight.dtype == torch.bfloat16
    assert host.blocks[0].down.weight.dtype == torch.float32
    assert len(weights_of(copied)) == len(list(host.parameters()))
    assert copied(torch.ones(1, 4, 64, dtype=torch.bfloat16), torch.ones(1, 64, dtype=torch.bfloat16)).isfinite().all()


def test_weights_left_in_main_memory_take_no_room_on_the_device() -> None:
    """A random network of 510 M weights, stored in 8 bits: what a step creates stays below a third of the weights in
    bfloat16, and the activations; each tensor is counted while it lives, as in the trainer's own estimate."""
    side, depth = 1536, 12
    with rehearsal(CPU, torch.bfloat16) as usual:
        plain = Blocks(side, depth)
        size = usual.live
        gradients(plain, torch.bfloat16, side)
    with rehearsal(CPU, torch.bfloat16) as memory:
        stored = Blocks(side, depth)
        stored.to = lambda *_: stored  # tensors without contents cannot change theirs
        for layer in layers_of(stored).values():
            layer.weight = nn.Parameter(layer.weight.detach().to(FLOAT8), requires_grad=False)
        freeze(stored, CPU, torch.bfloat16, resident=False)
        memory.peak = elsewhere = memory.live
        gradients(stored, torch.bfloat16, side)
    activations, found = usual.peak - size, memory.peak - elsewhere
    print(
        f"weights {size / 1e9:.3f} GB, usual peak {usual.peak / 1e9:.3f} GB, frozen ones elsewhere {found / 1e9:.3f} GB"
    )
    assert size > 1e9
    assert found < size / 3 + activations
