"""Frozen weights in small formats: what layers make of them, what gradients pass through, and what is not kept."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lcm_core.errors import InputError
from lcm_core.networks import frozen
from lcm_core.networks.frozen import FORMATS, offload, quantise
from lcm_core.networks.lora_layers import add_lora, checkpoint

CPU = torch.device("cpu")
ERRORS = {"int8": 0.01, "fp8": 0.05, "nf4": 0.15}
"""Of an output of normally distributed weights, as a share of its size."""
LAYERS = {
    "linear": (lambda: nn.Linear(128, 160), (3, 7, 128)),
    "conv": (lambda: nn.Conv2d(32, 64, 3, padding=1, stride=2), (2, 32, 8, 8)),
    "grouped": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=2), (2, 64, 8, 8)),
    "video": (lambda: nn.Conv3d(32, 32, 3, padding=1), (1, 32, 3, 8, 8)),
}


def usable(kind):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    return kind


def made(kind, make):
    """A layer before and after."""
    torch.manual_seed(0)
    network = nn.Sequential(make()).requires_grad_(False)
    plain = nn.Sequential(make()).requires_grad_(False)
    plain.load_state_dict(network.state_dict())
    quantise(network, usable(kind), CPU)
    return plain[0], network[0]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_layer_within_the_format(kind, name):
    make, shape = LAYERS[name]
    plain, small = made(kind, make)
    x = torch.randn(shape, requires_grad=True)
    outputs = [layer(x) for layer in (plain, small)]
    weights = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad((output * weights).sum(), x)[0] for output in outputs]
    for exact, found in (outputs, gradients):
        assert ((found - exact).norm() / exact.norm()).item() < ERRORS[kind]
        assert not torch.equal(found, exact)


def test_the_arithmetic_is_that_of_the_stored_numbers():
    """Of int8: an output's weights are whole numbers of 127ths of the largest; the gradient is of the same weights."""
    plain, small = made("int8", LAYERS["linear"][0])
    scale = plain.weight.abs().amax(1, keepdim=True).double() / 127
    weight = ((plain.weight.double() / scale).round() * scale).float()
    x = torch.randn(5, 128, requires_grad=True)
    found, expected = small(x), functional.linear(x, weight, plain.bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(output.square().sum(), x)[0] for output in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_no_converted_weight_is_kept_for_the_backward_pass(kind):
    _, small = made(kind, LAYERS["linear"][0])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        small(torch.randn(3, 128, requires_grad=True))
    assert kept == []


def test_a_large_layer_is_never_converted_as_a_whole(monkeypatch):
    """Some rows at a time, with the same result."""
    torch.manual_seed(0)
    _, small = made("int8", lambda: nn.Linear(128, 1000))
    x = torch.randn(2, 5, 128, requires_grad=True)

    def both():
        output = small(x)
        return output, torch.autograd.grad(output.sin().sum(), x)[0]

    whole = both()
    seen, convert = [], frozen._converted
    monkeypatch.setitem(frozen._AT_ONCE, "cpu", 128 * 300)
    monkeypatch.setattr(frozen, "_converted", lambda *args: seen.append(convert(*args)) or seen[-1])
    torch.testing.assert_close(both(), whole)
    assert [weight.shape[0] for weight in seen] == [300, 300, 300, 100] * 2


def test_autocast_decides_what_is_computed_in():
    _, small = made("int8", LAYERS["linear"][0])
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = small(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", FORMATS)
def test_a_lora_is_trained_on_small_weights(kind):
    """They take a half or a quarter of bfloat16's place, no gradient, and no place among the parameters."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 8))
    quantise(network, usable(kind), CPU)
    assert type(network[0]) is nn.Linear
    assert [name for name, _ in network.named_parameters()] == ["0.bias", "2.weight", "2.bias"]  # small ones stay
    adapters = add_lora(network, 4, target_modules=("0",))
    network(torch.randn(3, 256)).square().sum().backward()
    assert all(half.grad is not None for half in adapters.parameters())


def test_an_unknown_format_is_refused():
    with pytest.raises(InputError, match="unknown format of frozen weights 'int3'; choose int8, fp8, nf4"):
        quantise(nn.Linear(4, 4), "int3", CPU)


@pytest.mark.parametrize("kind", ["", "int8", "fp8"])
@pytest.mark.parametrize("name", LAYERS)
def test_offloaded_layers_compute_the_same_numbers(kind, name):
    """Bit by bit, and so do their gradients; the weight is none of the network's parameters, nor kept until then."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = nn.Sequential(make()).requires_grad_(False)
    resting = copy.deepcopy(plain)
    for network in (plain, resting):
        if kind:
            quantise(network, kind, CPU)
    offload(resting, CPU)
    assert [key for key, _ in resting.named_parameters()] == ["0.bias"]
    x, kept = torch.randn(shape, requires_grad=True), []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with hooks:
        output = resting(x)
    assert kept == []
    found = output, torch.autograd.grad(output.sin().sum(), x)[0]
    output = plain(x)
    expected = output, torch.autograd.grad(output.sin().sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["", "int8"])
def test_a_lora_on_offloaded_layers_stays_where_they_run(kind, monkeypatch):
    """On a device with no memory, which the weights reach when they are needed; also where activations are computed
    again in the backward pass."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows nothing of that device
    device = torch.device("meta")
    network = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    if kind:
        quantise(network, kind, CPU)
    offload(network, device)
    adapters = add_lora(network, 4, target_modules=("0", "2"))
    adapters.start_ema()
    adapters.add_critic()
    assert {parameter.device for parameter in network.parameters()} == {device}
    assert {layer.base.resting_weight.device for layer in adapters.layers.values()} == {CPU}
    x = torch.empty(3, 128, device=device, requires_grad=True)
    for run in (network, lambda x: checkpoint(network, x)):
        run(x).sum().backward()
        assert [half.grad.device for half in adapters.parameters()] == [device] * 4
        assert x.grad.shape == x.shape
        adapters.layers["0"].zero_grad()


def test_weights_lie_in_main_memory_one_behind_the_other():
    """torch rounds each piece of pinned memory up to a power of two."""
    torch.manual_seed(0)
    network = nn.Sequential(*[nn.Linear(192, 192) for _ in range(5)])
    weights = [layer.weight.clone() for layer in network]
    offload(network, CPU)
    assert len({layer.resting_weight.untyped_storage().data_ptr() for layer in network}) == 1
    torch.testing.assert_close([layer.resting_weight for layer in network], weights, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_holds_one_offloaded_weight_at_a_time():
    """32 layers of 16 MiB: trained on with the memory of a few of them, with the losses of layers that stay there."""
    device, losses, peaks = torch.device("cuda"), [], []
    for moves in (False, True):
        torch.manual_seed(0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        network = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(32)])
        if moves:
            offload(network, device)
        network.to(device)
        adapters = add_lora(network, 4, target_modules=[str(i) for i in range(32)])
        optimizer = torch.optim.AdamW(adapters.parameters(), 1e-3)
        for _ in range(3):
            loss = network(torch.ones(2, 2048, device=device)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del network, adapters, optimizer, loss
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    assert peaks[1] < 0.3 * peaks[0]
