"""Sampling of flow models against formulas in float64: what the network is fed must follow (1 - s) x0 + s eps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lcm_core.errors import InputError

X0 = 2.0
"""Of every pixel: the oracle knows it."""
GRID = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)


class Flow:
    """A host's model_sampling of a flow model."""

    def noise_scaling(self, s: Tensor, noise: Tensor, image: Tensor, max_denoise: bool = False) -> Tensor:
        """(1 - s) x0 + s eps."""
        return s * noise + (1 - s) * image


class Signal(Flow):
    """Of a model whose x is x0 + sigma eps."""

    def noise_scaling(self, s: Tensor, noise: Tensor, image: Tensor, max_denoise: bool = False) -> Tensor:
        """The host writes into the noise, too."""
        noise *= s
        noise += image
        return noise


class Cold(Flow):
    """Of a model that knows no noise."""

    def noise_scaling(self, s: Tensor, noise: Tensor, image: Tensor, max_denoise: bool = False) -> Tensor:
        """Images stay what they are."""
        return image


def run(flow: Any, gamma: float | None, network: Callable[[Tensor, Tensor], Tensor]) -> list[tuple[float, Tensor]]:
    """Sample with noise of 60,000 numbers; returns s and what the network was fed in each step."""
    torch.manual_seed(1)
    fed = []

    def model(x: Tensor, s: Tensor) -> Tensor:
        fed.append((float(s[0]), x))
        return network(x, s)

    noise = torch.randn(1, 60_000, dtype=torch.float64)
    result = flow.sample_flow(model, noise, GRID, Flow(), gamma=gamma)
    return [*fed, (0.0, result)]


@pytest.mark.parametrize("gamma", [None, 0.0, 0.3, 1.0])
def test_an_oracle_is_fed_the_right_mean_and_spread(flow: Any, gamma: float | None) -> None:
    """Mean (1 - s) x0 and spread s at every step, and x0 at the end: lcm and tcd."""
    fed = run(flow, gamma, lambda x, s: torch.full_like(x, X0))
    assert [s for s, _ in fed] == pytest.approx(GRID.tolist())
    for s, x in fed:
        assert float(x.mean()) == pytest.approx((1 - s) * X0, abs=0.02)
        assert float(x.std()) == pytest.approx(s, abs=0.02)


def test_without_fresh_noise_tcd_is_eulers_method(flow: Any) -> None:
    """gamma 0 follows the flow dx/ds = v: x + (s' - s) v with v = (x - x0) / s, whatever the network says."""

    def network(x: Tensor, s: Tensor) -> Tensor:
        return torch.sin(x) * s.view(-1, 1)

    fed = run(flow, 0.0, network)
    for (s, x), (s_next, found) in pairwise(fed):
        x0 = network(x, torch.tensor([s], dtype=torch.float64))
        torch.testing.assert_close(found, x + (s_next - s) * (x - x0) / s, rtol=1e-12, atol=1e-12)


def test_a_grid_that_is_split_goes_on_where_it_stopped(flow: Any) -> None:
    """A last level above 0 gives x at that level, which the host's next sampler takes."""
    noise = torch.randn(1, 60_000, dtype=torch.float64)
    x = flow.sample_flow(lambda x, s: torch.full_like(x, X0), noise, GRID[:4], Flow())
    assert float(x.mean()) == pytest.approx((1 - 0.5) * X0, abs=0.02)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)


def test_the_process_is_known_by_what_it_does(flow: Any) -> None:
    """Flow and x0 + sigma eps are told apart; a third kind is refused, by name."""
    assert flow.is_flow(Flow())
    assert not flow.is_flow(Signal())
    flow.check_noise(Flow())
    flow.check_noise(Signal())
    with pytest.raises(InputError, match=r"\(Flow\) adds noise in a way that LCM does not know"):
        flow.check_noise(Cold())
