"""Convolutions of small pictures for training on a CPU, beside torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lcm_core.networks.cpu.small_pictures import MOST_POSITIONS, SmallPictureConv2d, use_matrix_products
from lcm_core.networks.frozen import offload


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (2, 4, 4), (1, 1, 1), (2, 32, 32)])
def test_output_and_gradients_are_those_of_the_convolution(
    shape: tuple[int, int, int], has_bias: bool, stride: int
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 10, 3, stride, 1, bias=has_bias)
    network = nn.Sequential(plain)
    use_matrix_products(network)
    x = torch.randn(shape[0], 6, *shape[1:], requires_grad=True)
    reference = plain.double()(x.double())
    push = torch.randn_like(reference)
    leaves = [x, *plain.parameters()]
    expected = torch.autograd.grad(reference, leaves, push)
    plain.float()
    found = network(x)
    torch.testing.assert_close(found, reference.float(), rtol=1e-5, atol=1e-5)
    for own, right in zip(torch.autograd.grad(found, [x, *network.parameters()], push.float()), expected, strict=True):
        torch.testing.assert_close(own, right.to(own.dtype), rtol=1e-4, atol=1e-4)


def test_parameters_and_their_names_stay() -> None:
    network = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1))})
    before = dict(network.named_parameters())
    use_matrix_products(network)
    assert isinstance(network["a"], SmallPictureConv2d)
    assert isinstance(network["b"][0], SmallPictureConv2d)
    after = dict(network.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=1, dtype=torch.bfloat16),
    ],
)
def test_other_convolutions_are_left_alone(conv: nn.Conv2d) -> None:
    network = nn.Sequential(conv)
    use_matrix_products(network)
    assert network[0] is conv


def test_a_convolution_whose_weight_is_kept_elsewhere_is_left_alone() -> None:
    """What stands for it has its shape and format, but is no parameter."""
    network = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    offload(network, torch.device("cpu"))
    x = torch.randn(1, 64, 4, 4)
    before = network(x)
    use_matrix_products(network)
    torch.testing.assert_close(network(x), before, rtol=0, atol=0)


def test_a_large_batch_goes_the_usual_way() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    use_matrix_products(network)
    small, large = torch.randn(1, 4, 8, 8), torch.randn(MOST_POSITIONS // 64 + 1, 4, 8, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        network(large)
    assert not any("im2col" in event.key for event in seen.key_averages())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        network(small)
    assert any("im2col" in event.key for event in seen.key_averages())
