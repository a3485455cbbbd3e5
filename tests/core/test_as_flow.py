"""A variance-preserving network as a flow, beside FLOW's closed form and the other process's own steps in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lcm_core.diffusion.as_flow import as_flow
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.process import RectifiedFlow, VariancePreserving
from lcm_core.diffusion.samplers import sample_euler, sample_lcm
from lcm_core.errors import InputError

VP, FLOW = Diffusion(VariancePreserving(), "v_prediction"), Diffusion(RectifiedFlow(), "flow")
X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any function of both."""
    return torch.sin(x + t.view(-1, 1, 1, 1) / 300)


@pytest.mark.parametrize("t", [10, 400, 900, 999])
def test_it_is_the_closed_form(t: int) -> None:
    """v_flow(x, s) = (v_vp(x / r, t) - (1 - 2 s) x / r) / r at s = sigma / (1 + sigma)."""
    sigma = VP.process.sigmas[t]
    s = sigma / (1 + sigma)
    r = ((1 - s) ** 2 + s**2).sqrt()
    found = as_flow(network, VP)(X, s.expand(3))
    expected = (network(X / r, torch.full((3,), float(t), dtype=torch.float64)) - (1 - 2 * s) * X / r) / r
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("sampler", [sample_euler, sample_lcm])
def test_both_processes_sample_the_same(kind: str, sampler: object) -> None:
    """The same levels, noise and start: x = (1 - s) (x0 + sigma eps) at every step."""
    vp = Diffusion(VariancePreserving(), kind)
    flow = as_flow(network, vp)
    sigmas = torch.cat([vp.process.sigmas[[900, 600, 300, 50]], torch.zeros(1, dtype=torch.float64)])
    levels = sigmas / (1 + sigmas)

    def vp_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        t = vp.process.sigma_to_t(sigma)
        a, _ = vp.scales(t, x)
        return vp.x0(network(a * x, t), a * x, t)

    def flow_denoiser(x: Tensor, s: Tensor) -> Tensor:
        return x - s.view(-1, 1, 1, 1) * flow(x, s)

    noise = [torch.randn(X.shape, dtype=torch.float64) for _ in range(4)]
    draws = [iter(noise), iter(noise)]
    expected = sampler(vp_denoiser, X * sigmas[0], sigmas, disable=True, noise_sampler=lambda *_: next(draws[0]))
    found = sampler(
        flow_denoiser,
        X * levels[0],
        levels,
        disable=True,
        noise_sampler=lambda *_: next(draws[1]),
        process=FLOW.process,
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_pure_noise_has_an_answer() -> None:
    """At s = 1 the network is asked at its last timestep: eps is x, and x0 = a x - b v is -v."""
    s = torch.ones(3, dtype=torch.float64)
    found = as_flow(network, VP)(X, s)
    torch.testing.assert_close(found, X + network(X, torch.full((3,), 999.0, dtype=torch.float64)))


def test_a_network_that_predicts_noise_is_refused() -> None:
    """And a flow itself."""
    for diffusion in (Diffusion(), FLOW):
        with pytest.raises(InputError, match="cannot be made a flow; use v_prediction or sample"):
            as_flow(network, diffusion)
