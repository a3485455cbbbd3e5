"""Samplers against diffusers' schedulers: same weights, same noise, float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lcm_core.diffusion.consistency import ConsistencyDenoiser, Denoiser
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_sigmas_lcm, get_sigmas_leading, get_sigmas_linspace, get_sigmas_trailing
from lcm_core.diffusion.process import VariancePreserving
from lcm_core.diffusion.samplers import (
    initial_latents,
    initial_noise,
    sample_dpm_2m,
    sample_dpmpp_2m,
    sample_euler,
    sample_lcm,
    sample_tcd,
)
from lcm_core.diffusion.schedule import get_alphas_cumprod
from lcm_core.errors import InputError
from tests.core.sampling.conftest import SEED, SHAPE, TinyNet, assert_parity, ours, reference

STEPS = (1, 2, 3, 4, 5, 6, 8, 16)
STRENGTHS = (0.2, 0.35, 0.5, 0.6, 0.75, 0.9, 1.0)
PREDICTIONS = ("epsilon", "v_prediction", "sample")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", STEPS)
def test_lcm_differs_from_diffusers(net: TinyNet, schedule: VariancePreserving, steps: int, prediction: str) -> None:
    from diffusers import LCMScheduler

    model = ConsistencyDenoiser(net, Diffusion(schedule, prediction))
    compared = 0
    for strength in STRENGTHS:
        scheduler = LCMScheduler(prediction_type=prediction)
        if int(50 * strength) < steps:  # refused by both
            with pytest.raises(ValueError, match=str(steps)):
                scheduler.set_timesteps(steps, strength=strength)
            with pytest.raises(InputError, match=rf"{steps} steps at strength={strength}.*original_steps=50"):
                get_sigmas_lcm(schedule, steps, strength=strength)
            continue
        scheduler.set_timesteps(steps, strength=strength)
        expected = reference(scheduler, net, strength)
        assert_parity(ours(sample_lcm, model, get_sigmas_lcm(schedule, steps, 50, strength), strength), expected, 1e-5)
        compared += 1
    assert compared >= 6


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_differs_from_diffusers(net: TinyNet, schedule: VariancePreserving, gamma: float, prediction: str) -> None:
    from diffusers import TCDScheduler

    model = Denoiser(net, Diffusion(schedule, prediction))
    for steps in STEPS:
        for strength in STRENGTHS:
            if int(50 * strength) < steps:
                continue
            scheduler = TCDScheduler(prediction_type=prediction)
            scheduler.set_timesteps(steps, strength=strength)
            expected = reference(scheduler, net, strength, eta=gamma)
            sigmas = get_sigmas_lcm(schedule, steps, 50, strength)
            assert_parity(ours(sample_tcd, model, sigmas, strength, gamma=gamma), expected, 1e-5)


def test_custom_grids_differ_from_diffusers(net: TinyNet, schedule: VariancePreserving) -> None:
    """Custom timesteps, or another original_steps, would run on a wrong grid. 100 serves 16 steps at strength 0.2."""
    from diffusers import LCMScheduler, TCDScheduler

    custom = [999, 700, 421, 250, 10]
    for kind, sampler, model in (
        (LCMScheduler, sample_lcm, ConsistencyDenoiser(net, Diffusion(schedule))),
        (TCDScheduler, sample_tcd, Denoiser(net, Diffusion(schedule))),
    ):
        scheduler = kind()
        scheduler.set_timesteps(timesteps=custom)
        expected = reference(scheduler, net)
        assert_parity(ours(sampler, model, get_sigmas_lcm(schedule, None, timesteps=custom)), expected, 1e-5)
    scheduler = LCMScheduler(original_inference_steps=100)
    scheduler.set_timesteps(16, strength=0.2)
    expected = reference(scheduler, net, 0.2)
    model = ConsistencyDenoiser(net, Diffusion(schedule))
    assert_parity(ours(sample_lcm, model, get_sigmas_lcm(schedule, 16, 100, 0.2), 0.2), expected, 1e-5)


def test_tcd_jumps_land_on_diffusers_timesteps(schedule: VariancePreserving) -> None:
    """floor((1 - gamma) t) in another precision than diffusers' float32 would land one timestep off."""
    grid = torch.arange(999, 0, -1)
    for gamma in (0.05, 0.1, 0.2, 0.3, 0.45, 0.5, 0.7, 0.75, 0.9, 0.99, 1.0):
        landed: list[float] = []

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            return torch.zeros_like(x)

        for i in range(0, 998, 7):
            sigmas = get_sigmas_lcm(schedule, None, timesteps=grid[[i, i + 1]])
            # With denoised 0 and noise 0 the first step scales x by sigma_s / sigma.
            kept: list[Tensor] = []
            sample_tcd(
                model,
                torch.ones(1, 1, dtype=torch.float64),
                sigmas,
                callback=lambda state, kept=kept: kept.append(state["x"]),
                disable=True,
                noise_sampler=lambda *_: torch.zeros(1, 1, dtype=torch.float64),
                gamma=gamma,
            )
            landed.append(float(schedule.sigma_to_t(kept[1].flatten() * sigmas[0].double())))
        expected = torch.floor((1 - gamma) * grid[1:998:7][: len(landed)])
        torch.testing.assert_close(torch.tensor(landed), expected, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [2, 4, 5, 10, 20, 25])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler_differs_from_ddim(net: TinyNet, schedule: VariancePreserving, steps: int, prediction: str) -> None:
    """On grids whose gaps are T // N, as DDIMScheduler assumes."""
    from diffusers import DDIMScheduler

    for spacing, grid in (("leading", get_sigmas_leading), ("trailing", get_sigmas_trailing)):
        scheduler = DDIMScheduler(
            **BETAS, clip_sample=False, steps_offset=1, timestep_spacing=spacing, prediction_type=prediction
        )
        scheduler.set_timesteps(steps)
        expected = reference(scheduler, net)
        actual = ours(sample_euler, Denoiser(net, Diffusion(schedule, prediction)), grid(schedule, steps))
        assert_parity(actual, expected, 1e-4)


@pytest.mark.parametrize("steps", [2, 3, 7, 12, 30])
def test_euler_differs_from_ddim_on_uneven_grids(net: TinyNet, schedule: VariancePreserving, steps: int) -> None:
    """DDIMScheduler jumps by T // N even where its linspace or trailing grid has other gaps, so its step is asked on a
    chain that has the grid's noise levels only."""
    from diffusers import DDIMScheduler

    for spacing, get_sigmas in (("linspace", get_sigmas_linspace), ("trailing", get_sigmas_trailing)):
        full = DDIMScheduler(**BETAS, timestep_spacing=spacing)
        full.set_timesteps(steps)
        abar = get_alphas_cumprod()[full.timesteps.flip(0)]
        betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
        scheduler = DDIMScheduler(trained_betas=betas.tolist(), num_train_timesteps=steps, clip_sample=False)
        scheduler.set_timesteps(steps)
        expected = reference(scheduler, lambda x, i, full=full: net(x, full.timesteps.flip(0)[i]))  # type: ignore[arg-type]
        assert_parity(
            ours(sample_euler, Denoiser(net, Diffusion(schedule)), get_sigmas(schedule, steps)), expected, 1e-4
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 5, 9, 10, 14, 15, 20, 25])
def test_dpmpp_2m_differs_from_diffusers(
    net: TinyNet, schedule: VariancePreserving, steps: int, prediction: str
) -> None:
    from diffusers import DPMSolverMultistepScheduler

    grids = {
        "leading": get_sigmas_leading(schedule, steps, drop_last=True),
        "linspace": get_sigmas_linspace(schedule, steps, drop_last=True),
        "trailing": get_sigmas_trailing(schedule, steps),
    }
    for spacing, sigmas in grids.items():
        scheduler = DPMSolverMultistepScheduler(
            **BETAS, steps_offset=1, timestep_spacing=spacing, prediction_type=prediction
        )
        assert (scheduler.config.solver_order, scheduler.config.solver_type) == (2, "midpoint")
        scheduler.set_timesteps(steps)
        expected = reference(scheduler, net)
        assert_parity(ours(sample_dpmpp_2m, Denoiser(net, Diffusion(schedule, prediction)), sigmas), expected, 1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25])
def test_dpm_2m_differs_from_diffusers(net: TinyNet, schedule: VariancePreserving, steps: int, prediction: str) -> None:
    """diffusers' ends at timestep 0, and in variance-preserving coordinates."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        **BETAS,
        algorithm_type="dpmsolver",
        final_sigmas_type="sigma_min",
        lower_order_final=False,
        timestep_spacing="trailing",
        prediction_type=prediction,
    )
    scheduler.set_timesteps(steps)
    expected = reference(scheduler, net)
    sigmas = get_sigmas_trailing(schedule, steps)
    sigmas[-1] = schedule.sigmas[0]
    actual = ours(sample_dpm_2m, Denoiser(net, Diffusion(schedule, prediction)), sigmas) / (1 + sigmas[-1] ** 2).sqrt()
    assert_parity(actual, expected, 1e-4)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_not_exact(net: TinyNet, steps: int, prediction: str) -> None:
    """From pure noise, without a stand-in for the infinite sigma."""
    from diffusers import LCMScheduler

    process = VariancePreserving(get_alphas_cumprod(zero_terminal_snr=True))
    scheduler = LCMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True)
    scheduler.alphas_cumprod = process.alphas_cumprod.float()  # diffusers' own are good to 1e-4 only
    scheduler.set_timesteps(steps)
    model = ConsistencyDenoiser(net, Diffusion(process, prediction))
    actual = ours(sample_lcm, model, get_sigmas_lcm(process, steps), process=process)
    assert_parity(actual, reference(scheduler, net), 1e-6)


@pytest.mark.parametrize("sampler", [sample_lcm, sample_tcd, sample_euler])  # the others look back, over an infinite h
def test_zero_terminal_snr_gives_another_picture_than_its_limit(net: TinyNet, sampler: Any) -> None:
    """In the scale x_t = a x0 + b eps every sampler does what it does in x0 + sigma eps, whose last sigma is finite."""
    exact = VariancePreserving(get_alphas_cumprod(zero_terminal_snr=True))
    noise = initial_noise([SEED + 1], SHAPE).double()
    limit = exact.alphas_cumprod.clone()
    limit[-1] = 1e-11
    pictures = []
    for process in (exact, VariancePreserving(limit)):
        kind = ConsistencyDenoiser if sampler is sample_lcm else Denoiser
        model = kind(lambda x, t: net(x.float(), t).double(), Diffusion(process, "v_prediction"))
        x = initial_latents(initial_noise([SEED], SHAPE).double(), get_sigmas_trailing(process, 6)[0], process=process)
        sigmas = torch.cat([process.sigmas[[999, 800, 500, 200, 40]], torch.zeros(1, dtype=torch.float64)])
        pictures.append(sampler(model, x, sigmas, disable=True, noise_sampler=lambda *_: noise, process=process))
    assert_parity(pictures[0], pictures[1], 2e-5)
