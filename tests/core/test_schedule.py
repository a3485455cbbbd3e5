"""Noise schedules and grids against diffusers and against float64 formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_core.diffusion.grids import (
    get_sigmas_lcm,
    get_sigmas_leading,
    get_sigmas_linspace,
    get_sigmas_trailing,
    get_timesteps_lcm,
)
from lcm_core.diffusion.process import ZERO_SNR_ABAR, RectifiedFlow, VariancePreserving, abar_from_sigma
from lcm_core.diffusion.schedule import get_alphas_cumprod, rescale_zero_terminal_snr
from lcm_core.errors import InputError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def schedule() -> VariancePreserving:
    return VariancePreserving(get_alphas_cumprod())


def timesteps_of(schedule: VariancePreserving, sigmas: torch.Tensor) -> list[int]:
    assert sigmas.dtype == torch.float32
    assert sigmas[-1] == 0
    return schedule.sigma_to_t(sigmas[:-1]).long().tolist()


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(
    ("name", "theirs"), [("scaled_linear", "scaled_linear"), ("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_alphas_cumprod_differ_from_diffusers(name: str, theirs: str, zero_terminal_snr: bool) -> None:
    from diffusers import DDIMScheduler

    args: dict[str, Any] = {"beta_start": 0.0002, "beta_end": 0.015, "num_train_timesteps": 700}
    expected = DDIMScheduler(beta_schedule=theirs, rescale_betas_zero_snr=zero_terminal_snr, **args).alphas_cumprod
    actual = get_alphas_cumprod(name, zero_terminal_snr=zero_terminal_snr, **args)
    assert actual.dtype == torch.float64
    # diffusers' float32 betas near 1 (cosine, zero SNR) leave their products good to about 1e-4 relative
    torch.testing.assert_close(actual.float(), expected, rtol=2e-4, atol=2e-7)


def test_rescaling_moves_the_first_value_or_leaves_signal() -> None:
    abar = get_alphas_cumprod()
    rescaled = rescale_zero_terminal_snr(abar)
    assert rescaled[-1] == 0
    torch.testing.assert_close(rescaled[0], abar[0], rtol=1e-12, atol=0)


def test_zero_terminal_snr_is_not_exact() -> None:
    """The last level is pure noise, not a stand-in for it, and is found again from its infinite sigma."""
    schedule = VariancePreserving(get_alphas_cumprod(zero_terminal_snr=True))
    assert schedule.zero_terminal_snr
    assert schedule.sigmas[-1] == math.inf
    assert bool((schedule.sigmas.diff() > 0).all())
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(schedule.sigma_to_t(schedule.sigmas.to(dtype)), torch.arange(1000).to(dtype))
        assert schedule.t_to_sigma(torch.tensor([999.0], dtype=dtype)) == math.inf
    a, b = schedule.coefficients(torch.tensor([999, 0]))
    torch.testing.assert_close(torch.stack([a, b])[:, 0], torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=0)
    torch.testing.assert_close(a[1] ** 2, schedule.alphas_cumprod[0])


def test_a_host_that_clamps_zero_snr_is_not_recognised() -> None:
    """ComfyUI puts a tiny abar in the place of 0; its sigmas are finite then, and epsilon is no use all the same."""
    clamped = get_alphas_cumprod(zero_terminal_snr=True).float()
    clamped[-1] = ZERO_SNR_ABAR
    schedule = VariancePreserving(clamped)
    assert schedule.zero_terminal_snr
    assert not schedule.reaches_pure_noise
    assert math.isclose(float(schedule.sigmas[-1]), math.sqrt((1 - ZERO_SNR_ABAR) / ZERO_SNR_ABAR), rel_tol=1e-6)
    assert not VariancePreserving(get_alphas_cumprod("cosine")).zero_terminal_snr
    assert not VariancePreserving(get_alphas_cumprod()).zero_terminal_snr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
def test_grid_points_come_back_as_fractions(name: str, dtype: torch.dtype) -> None:
    schedule = VariancePreserving(get_alphas_cumprod(name))
    grid = torch.arange(1000)
    assert torch.equal(schedule.sigma_to_t(schedule.sigmas.to(dtype)), grid.to(dtype))
    # a host that kept its table in float32 is off by the last bit
    jittered = (schedule.sigmas.float() * (1 + 1.2e-7)).to(dtype)
    assert torch.equal(schedule.sigma_to_t(jittered), grid.to(dtype))
    torch.testing.assert_close(schedule.t_to_sigma(grid.to(dtype)), schedule.sigmas.to(dtype), rtol=3e-6, atol=0)


def test_interpolation_is_not_linear_in_log_sigma(schedule: VariancePreserving) -> None:
    log_sigmas = schedule.sigmas.log().numpy()
    sigma = torch.logspace(math.log10(0.03), math.log10(14.6), 997, dtype=torch.float64)
    expected = torch.from_numpy(np.interp(sigma.log().numpy(), log_sigmas, np.arange(1000.0)))
    torch.testing.assert_close(schedule.sigma_to_t(sigma), expected, rtol=0, atol=1.1e-3)  # snapped where close
    t = torch.linspace(0, 999, 313, dtype=torch.float64)
    expected = torch.from_numpy(np.exp(np.interp(t.numpy(), np.arange(1000.0), log_sigmas)))
    torch.testing.assert_close(schedule.t_to_sigma(t), expected)
    assert schedule.sigma_to_t(sigma.reshape(-1, 1)).shape == (997, 1)


def test_sigmas_outside_the_table_leave_it(schedule: VariancePreserving) -> None:
    t = schedule.sigma_to_t(torch.tensor([0.0, 1e-6, 20.0, float("inf")]))
    assert t.tolist() == [0, 0, 999, 999]


def test_abar_from_sigma_is_wrong(schedule: VariancePreserving) -> None:
    torch.testing.assert_close(abar_from_sigma(schedule.sigmas), schedule.alphas_cumprod)


@settings(max_examples=300, deadline=None)
@given(
    steps=st.integers(1, 120),
    original_steps=st.integers(1, 120),
    percent=st.integers(1, 100),
    total=st.sampled_from([1000, 997, 500, 128]),
)
def test_lcm_grid_differs_from_diffusers(steps: int, original_steps: int, percent: int, total: int) -> None:
    """Also: what diffusers refuses must be refused, with the numbers named."""
    from diffusers import LCMScheduler

    strength = percent / 100
    process = VariancePreserving(get_alphas_cumprod(num_train_timesteps=total))
    scheduler = LCMScheduler(original_inference_steps=original_steps, num_train_timesteps=total)
    try:
        scheduler.set_timesteps(steps, strength=strength)
    except ValueError:
        with pytest.raises(InputError, match=rf"^{steps} steps .*original_steps={original_steps}"):
            get_timesteps_lcm(steps, original_steps, strength, process)
        return
    grid = get_timesteps_lcm(steps, original_steps, strength, process)
    assert grid.dtype == torch.int64
    assert grid.tolist() == scheduler.timesteps.tolist()


def test_lcm_sigmas_do_not_belong_to_their_timesteps(schedule: VariancePreserving) -> None:
    sigmas = get_sigmas_lcm(schedule, 4, strength=0.6)
    torch.testing.assert_close(sigmas[:-1], schedule.sigmas[[599, 459, 299, 159]].float(), rtol=0, atol=0)
    assert sigmas[-1] == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 15, 16, 25, 50, 333, 500])
def test_teacher_grids_differ_from_diffusers(schedule: VariancePreserving, steps: int) -> None:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    grids = {"leading": get_sigmas_leading, "linspace": get_sigmas_linspace}
    for spacing in ("leading", "linspace", "trailing"):
        for kind, drop_last in ((DDIMScheduler, False), (DPMSolverMultistepScheduler, True)):
            if steps == 1 and spacing == "linspace" and not drop_last:
                continue  # diffusers starts at t = 0 there; see test_bad_input_is_accepted
            scheduler = kind(**BETAS, timestep_spacing=spacing, steps_offset=1)
            scheduler.set_timesteps(steps)
            expected = [t for t in scheduler.timesteps.tolist() if t >= 0]  # numpy rounds some grids one point too long
            if spacing == "trailing":
                sigmas = get_sigmas_trailing(schedule, steps)
            else:
                sigmas = grids[spacing](schedule, steps, drop_last=drop_last)
            assert timesteps_of(schedule, sigmas) == expected


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.99, 1.0])
def test_strength_keeps_the_wrong_end(schedule: VariancePreserving, strength: float) -> None:
    """Image to image keeps the last int(N * strength) steps, as diffusers' pipelines do."""
    for get_sigmas in (get_sigmas_trailing, get_sigmas_leading, get_sigmas_linspace):
        kept = int(20 * strength)
        assert torch.equal(get_sigmas(schedule, 20, strength), get_sigmas(schedule, 20)[20 - kept :])
    custom = [999, 600, 400, 10]
    expected = custom[4 - int(4 * strength) :]
    assert timesteps_of(schedule, get_sigmas_lcm(schedule, None, strength=strength, timesteps=custom)) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: get_sigmas_lcm(s, 0), "^0 steps"),
        (lambda s: get_sigmas_lcm(s, -1), "^-1 steps"),
        (lambda s: get_sigmas_lcm(s, 51), "51 steps are more than original_steps=50"),
        (lambda s: get_sigmas_lcm(s, 4, 0), "original_steps=0 must be 1 to 1000"),
        (lambda s: get_sigmas_lcm(s, 4, 1001), "original_steps=1001 must be 1 to 1000"),
        (lambda s: get_sigmas_lcm(s, 4, strength=0.0), r"strength=0.0 is outside \(0, 1\]"),
        (lambda s: get_sigmas_lcm(s, 4, strength=1.01), r"strength=1.01 is outside \(0, 1\]"),
        (lambda s: get_sigmas_lcm(s, 4, strength=float("nan")), "strength=nan is outside"),
        (lambda s: get_sigmas_lcm(s, 4, strength=0.05), "4 steps at strength=0.05 .* 2 timesteps .* at least 0.08"),
        (lambda s: get_sigmas_lcm(s, None), "neither num_inference_steps nor timesteps"),
        (lambda s: get_sigmas_lcm(s, 3, timesteps=[9, 5]), "num_inference_steps=3 but 2 timesteps"),
        (lambda s: get_sigmas_lcm(s, None, timesteps=[5, 9]), r"timesteps \[5, 9\] must fall strictly"),
        (lambda s: get_sigmas_lcm(s, None, timesteps=[9, 9]), "must fall strictly"),
        (lambda s: get_sigmas_lcm(s, None, timesteps=[1000, 9]), r"lie in 0\.\.999"),
        (lambda s: get_sigmas_lcm(s, None, timesteps=[9, -1]), r"lie in 0\.\.999"),
        (lambda s: get_sigmas_lcm(s, None, timesteps=[]), "one or more whole numbers"),
        (lambda s: get_sigmas_lcm(s, None, timesteps=[9.5, 2.0]), "one or more whole numbers"),
        (lambda s: get_sigmas_lcm(s, None, timesteps=[9, 5], strength=0.3), "strength=0.3 leaves none of 2 steps"),
        (lambda s: get_sigmas_trailing(s, 0), "^0 steps"),
        (lambda s: get_sigmas_trailing(s, 1001), "at most 1000"),
        (lambda s: get_sigmas_trailing(s, 4, 0.2), "strength=0.2 leaves none of 4 steps"),
        (lambda s: get_sigmas_trailing(s, 4, 1.5), "strength=1.5 is outside"),
        (lambda s: get_sigmas_linspace(s, 1), "1 step with linspace spacing"),
        (
            lambda s: get_sigmas_leading(s, 1000),
            "1000 steps with steps_offset=1 would start at t = 1000, .* fewer steps",
        ),
        (lambda s: get_sigmas_leading(s, 4, steps_offset=-1), r"timesteps \[749, 499, 249, -1\] must fall"),
        (lambda s: get_sigmas_lcm(s, None, timesteps=range(100)), r"timesteps \[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\] must"),
        (lambda s: get_alphas_cumprod("sigmoid"), "unknown noise schedule 'sigmoid'"),
        (lambda s: get_alphas_cumprod(beta_start=0.5, beta_end=0.1), "beta_start=0.5"),
        (lambda s: get_alphas_cumprod(num_train_timesteps=1), "num_train_timesteps=1"),
        (lambda s: VariancePreserving(torch.tensor([0.2, 0.5])), "fall strictly"),
        (lambda s: VariancePreserving(torch.tensor([1.5, 0.5])), "fall strictly and lie in"),
        (lambda s: VariancePreserving(torch.tensor([0.5, float("nan")])), "NaN"),
        (lambda s: VariancePreserving(torch.tensor([[0.5, 0.2]])), "no schedule"),
    ],
)
def test_bad_input_is_accepted(schedule: VariancePreserving, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(schedule)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_flow_grid_differs_from_diffusers(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    flow = RectifiedFlow(shift)
    torch.testing.assert_close(get_sigmas_lcm(flow, steps), scheduler.sigmas.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(get_sigmas_trailing(flow, steps), scheduler.sigmas.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(get_timesteps_lcm(steps, process=flow).float(), scheduler.timesteps, rtol=1e-6, atol=0)


def test_the_grid_of_the_lightning_loras_is_another() -> None:
    """Shift 5 at 4 steps is what they were trained on."""
    grid = get_timesteps_lcm(4, process=RectifiedFlow(5.0))
    torch.testing.assert_close(grid, torch.tensor([1000.0, 937.5, 2500 / 3, 625.0], dtype=torch.float64))


def test_flow_strength_starts_elsewhere() -> None:
    """Image to image begins at exactly the shifted strength, with all its steps."""
    flow = RectifiedFlow(3.0)
    torch.testing.assert_close(
        get_sigmas_lcm(flow, 2, strength=0.5), torch.tensor([3 * 0.5 / 2, 3 * 0.25 / 1.5, 0.0]), rtol=1e-6, atol=0
    )
    assert get_sigmas_lcm(flow, None, timesteps=[1000, 937.5, 500]).tolist() == [1.0, 0.9375, 0.5, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RectifiedFlow(0.0), "shift=0 is out of range"),
        (lambda: RectifiedFlow(num_train_timesteps=1), "num_train_timesteps=1"),
        (lambda: get_sigmas_lcm(RectifiedFlow(), None, timesteps=[1000.5, 5]), r"lie in \(0, 1000\]"),
        (lambda: get_sigmas_lcm(RectifiedFlow(), None, timesteps=[500, 0]), r"lie in \(0, 1000\]"),
        (lambda: get_sigmas_lcm(RectifiedFlow(), 4, strength=0.0), "strength=0.0 is outside"),
    ],
)
def test_a_bad_flow_is_accepted(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
