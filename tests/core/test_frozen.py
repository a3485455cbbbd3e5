"""Frozen weights in small formats: what layers make of them, what gradients pass through, and what is not kept."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lcm_core.errors import InputError
from lcm_core.networks import frozen
from lcm_core.networks.frozen import FORMATS, quantise
from lcm_core.networks.lora_layers import add_lora

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
