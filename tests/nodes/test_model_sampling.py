"""What a host's `model_sampling` is known as, and sampling of flow models against formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lcm_core.errors import InputError
from tests.nodes.model_samplings import Cold, Continuous, Discrete, DiscreteV, Flow, Loud, Mute, Raw

X0 = 2.0
"""Of every pixel: the oracle knows it."""
GRID = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64)


def run(
    model_sampling: Any, gamma: float | None, network: Callable[[Tensor, Tensor], Tensor]
) -> list[tuple[float, Tensor]]:
    """Sample with noise of 60,000 numbers; returns s and what the network was fed in each step."""
    torch.manual_seed(1)
    fed = []

    def model(x: Tensor, s: Tensor) -> Tensor:
        fed.append((float(s[0]), x))
        return network(x, s)

    noise = torch.randn(1, 60_000, dtype=torch.float64)
    result = model_sampling.sample_flow(model, noise, GRID, gamma=gamma)
    return [*fed, (0.0, result)]


@pytest.mark.parametrize("gamma", [None, 0.0, 0.3, 1.0])
def test_an_oracle_is_fed_the_right_mean_and_spread(model_sampling: Any, gamma: float | None) -> None:
    """Mean (1 - s) x0 and spread s at every step, and x0 at the end: lcm and tcd."""
    fed = run(model_sampling, gamma, lambda x, s: torch.full_like(x, X0))
    assert [s for s, _ in fed] == pytest.approx(GRID.tolist())
    for s, x in fed:
        assert float(x.mean()) == pytest.approx((1 - s) * X0, abs=0.02)
        assert float(x.std()) == pytest.approx(s, abs=0.02)


def test_without_fresh_noise_tcd_is_eulers_method(model_sampling: Any) -> None:
    """gamma 0 follows the flow dx/ds = v: x + (s' - s) v with v = (x - x0) / s, whatever the network says."""

    def network(x: Tensor, s: Tensor) -> Tensor:
        return torch.sin(x) * s.view(-1, 1)

    fed = run(model_sampling, 0.0, network)
    for (s, x), (s_next, found) in pairwise(fed):
        x0 = network(x, torch.tensor([s], dtype=torch.float64))
        torch.testing.assert_close(found, x + (s_next - s) * (x - x0) / s, rtol=1e-12, atol=1e-12)


def test_a_grid_that_is_split_goes_on_where_it_stopped(model_sampling: Any) -> None:
    """A last level above 0 gives x at that level, which the host's next sampler takes."""
    noise = torch.randn(1, 60_000, dtype=torch.float64)
    x = model_sampling.sample_flow(lambda x, s: torch.full_like(x, X0), noise, GRID[:4])
    assert float(x.mean()) == pytest.approx((1 - 0.5) * X0, abs=0.02)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)


def test_later_noise_is_as_large_as_the_first(model_sampling: Any) -> None:
    """Some models want noise of a spread above 1: x = (1 - s) x0 + s scale eps."""
    torch.manual_seed(1)
    noise = torch.randn(1, 60_000, dtype=torch.float64)
    x = model_sampling.sample_flow(lambda x, s: torch.full_like(x, X0), noise, GRID[:4], noise_scale=8.0)
    assert float(x.std()) == pytest.approx(0.5 * 8, abs=0.05)


def test_the_process_is_known_by_what_it_does(model_sampling: Any) -> None:
    """Flow with its shift, and each prediction on a table of noise levels, which is the model's own."""
    found = model_sampling.diffusion_of(Flow())
    assert (found.prediction_type, found.process.shift) == ("flow", pytest.approx(3.0))
    assert model_sampling.diffusion_of(Loud()).prediction_type == "flow"
    for sampling, kind in ((Discrete(), "epsilon"), (DiscreteV(), "v_prediction")):
        found = model_sampling.diffusion_of(sampling)
        assert found.prediction_type == kind
        torch.testing.assert_close(found.process.sigmas.float(), sampling.sigmas)


@pytest.mark.parametrize("kind", [Cold, Raw, Continuous, Mute])
def test_any_other_process_is_refused_by_name(model_sampling: Any, kind: Any) -> None:
    """Hosts build a class of two, which say what it is."""
    with pytest.raises(InputError, match=rf"\({kind.__name__}\) adds noise in a way that LCM does not know"):
        model_sampling.diffusion_of(type("ModelSampling", (kind,), {})())
