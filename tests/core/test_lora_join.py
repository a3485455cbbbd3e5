"""Several LoRAs in one file do what they do one beside the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lcm_core.files.lora import merge, read_lora
from lcm_core.files.lora_join import join, to_diffusers, to_kohya


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.conv1, self.proj_in = nn.Linear(12, 16), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 1)


def halves(network, path, rank, seed, flat=False):
    """Random kohya tensors of a layer, with alpha 3."""
    weight, generator = network.get_submodule(path).weight, torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *weight.shape[1:], generator=generator)
    up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
    name = f"lora_unet_{path}"
    down, up = (down.flatten(1), up.flatten(1)) if flat else (down, up)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}


def merged(*loras):
    network = Network()
    merge(network, loras)
    return {name: value.detach() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_plain_loras_join_exactly(layout):
    """Ranks, alphas, strengths, layers that one alone has, and a 1x1 convolution stored as a matrix."""
    network = Network()
    style = {**halves(network, "to_q", 2, 1), **halves(network, "conv1", 3, 2)}
    fast = {**halves(network, "to_q", 4, 3), **halves(network, "proj_in", 2, 4, flat=True)}
    loras = [(read_lora(style), 0.7), (read_lora(fast), 1.0)]
    layers, lost = join(loras, "unet", dict(network.state_dict()), rank=4)
    assert lost == 0
    assert layers["to_q"][0].shape == (6, 12)
    to = to_kohya(layers, "lora_unet_", torch.float32) if layout == "kohya" else None
    whole = to or to_diffusers(layers, "transformer", {}, torch.float32)
    expected, found = merged(*loras), merged((read_lora(whole), 1.0))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)


def test_other_kinds_are_written_as_near_as_their_rank_allows():
    """A LoHa of ranks 2 has rank 4 at most: exact with 4, and with 1 what is left out is said."""
    network = Network()
    roles = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 12), "hada_w2_a": (16, 2), "hada_w2_b": (2, 12)}
    generator = torch.Generator().manual_seed(0)
    style = {f"lora_unet_to_q.{role}": torch.randn(shape, generator=generator) for role, shape in roles.items()}
    loras = [(read_lora(style), 0.5)]
    layers, lost = join(loras, "unet", dict(network.state_dict()), rank=4)
    whole = read_lora(to_kohya(layers, "lora_unet_", torch.float32))
    torch.testing.assert_close(merged((whole, 1.0))["to_q.weight"], merged(*loras)["to_q.weight"], rtol=0, atol=1e-4)
    assert lost < 1e-4
    _, lost = join(loras, "unet", dict(network.state_dict()), rank=1)
    change = merged(*loras)["to_q.weight"] - network.to_q.weight
    values = torch.linalg.svdvals(change.double())
    assert lost == pytest.approx(float((values[1:].norm() / values.norm()).detach()), rel=1e-3)


def test_a_dora_is_joined_with_the_weights_that_it_is_for():
    network = Network()
    style = halves(network, "to_q", 2, 1) | {"lora_unet_to_q.dora_scale": torch.rand(16, 1) + 0.5}
    loras = [(read_lora(style), 1.0)]
    layers, _ = join(loras, "unet", dict(network.state_dict()), rank=12)
    whole = read_lora(to_kohya(layers, "lora_unet_", torch.float32))
    torch.testing.assert_close(merged((whole, 1.0))["to_q.weight"], merged(*loras)["to_q.weight"], rtol=0, atol=1e-4)
