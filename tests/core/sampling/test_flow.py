"""Samplers on a flow process: diffusers' flow schedulers, and what the process itself demands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcm_core.diffusion.consistency import ConsistencyDenoiser, Denoiser
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_sigmas_lcm
from lcm_core.diffusion.process import Process, RectifiedFlow, VariancePreserving
from lcm_core.diffusion.samplers import initial_latents, inpaint, sample_euler, sample_lcm, sample_tcd
from tests.core.sampling.conftest import SEED, SHAPE, TinyNet, assert_parity, ours


def flow_reference(scheduler: Any, net: nn.Module, sigmas: list[float]) -> Tensor:
    """diffusers' own loop for a velocity network."""
    scheduler.set_timesteps(sigmas=sigmas)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(1, *SHAPE, generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["FlowMatchLCMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_flow_differs_from_diffusers(net: TinyNet, name: str, steps: int, shift: float) -> None:
    """From pure noise, at 1e-6 relative."""
    import diffusers

    flow = RectifiedFlow(shift)
    sampler = sample_lcm if name == "FlowMatchLCMScheduler" else sample_euler
    expected = flow_reference(getattr(diffusers, name)(shift=shift), net, [1 - i / steps for i in range(steps)])
    model = ConsistencyDenoiser(net, Diffusion(flow, "flow"))
    actual = ours(sampler, model, get_sigmas_lcm(flow, steps), process=flow)
    assert_parity(actual, expected, 1e-6)


@pytest.mark.parametrize("shape", [(2, 16, 6, 6), (2, 16, 5, 6, 6)])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_on_a_flow_leaves_the_noise_process(shape: tuple[int, ...], steps: int, gamma: float) -> None:
    """With the true velocity of one known picture, x must hold (1 - s) x0 and noise of spread s at every step."""
    flow, x0 = RectifiedFlow(3.0), 2.0
    sigmas = get_sigmas_lcm(flow, steps)
    generator = torch.Generator().manual_seed(0)
    seen: list[Tensor] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return torch.full_like(x, x0)

    big = (400, *shape[1:])
    x = initial_latents(torch.randn(big, generator=generator), sigmas[0], process=flow)
    end = sample_tcd(
        model,
        x,
        sigmas,
        disable=True,
        process=flow,
        gamma=gamma,
        noise_sampler=lambda *_: torch.randn(big, generator=generator),
    )
    torch.testing.assert_close(end, torch.full_like(end, x0))
    for x_s, s in zip(seen, sigmas.tolist(), strict=False):
        assert float(x_s.mean()) == pytest.approx((1 - s) * x0, abs=0.01)
        assert float(x_s.std()) == pytest.approx(s, abs=0.01)


def test_tcd_on_a_flow_is_not_euler_at_gamma_0_nor_lcm_at_gamma_1(net: TinyNet) -> None:
    flow = RectifiedFlow(3.0)
    sigmas, model = get_sigmas_lcm(flow, 4), Denoiser(net, Diffusion(flow, "flow"))
    euler, lcm = (ours(sampler, model, sigmas, process=flow) for sampler in (sample_euler, sample_lcm))
    assert_parity(ours(sample_tcd, model, sigmas, process=flow, gamma=0.0), euler, 1e-6)
    assert_parity(ours(sample_tcd, model, sigmas, process=flow, gamma=1.0), lcm, 1e-6)


@pytest.mark.parametrize("process", [RectifiedFlow(3.0), VariancePreserving()])
def test_picture_to_picture_begins_at_another_noise_level(process: Process) -> None:
    """x = a x0 + b noise at the sampler's scale; a mask keeps the known part at it in every step."""
    x0, noise = torch.full((2, 4, 3, 3), 2.0), torch.randn(2, 4, 3, 3)
    sigma = get_sigmas_lcm(process, 4, strength=0.5)[0]
    a = 1 - sigma if isinstance(process, RectifiedFlow) else 1.0
    torch.testing.assert_close(initial_latents(noise, sigma, x0, process), a * x0 + sigma * noise)
    mask = torch.zeros(1, 1, 3, 3)
    mask[..., 0] = 1
    seen: list[Tensor] = []
    model = inpaint(lambda x, sigma: seen.append(x) or torch.zeros_like(x), x0, mask, noise, process)  # type: ignore[func-returns-value]
    kept = model(torch.zeros_like(x0), sigma.expand(2))
    torch.testing.assert_close(seen[0][..., 1:], (a * x0 + sigma * noise)[..., 1:])
    torch.testing.assert_close(kept[..., 1:], x0[..., 1:])
    assert not kept[..., 0].any()
