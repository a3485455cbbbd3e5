"""Solver jumps against the papers' formulas in float64, and their order on a PF-ODE that has a closed solution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.process import RectifiedFlow, VariancePreserving
from lcm_core.diffusion.schedule import get_alphas_cumprod
from lcm_core.diffusion.solver import SOLVERS, solver_jump
from lcm_core.errors import InputError

ABAR = get_alphas_cumprod()
SCHEDULE = VariancePreserving(ABAR)
DIFFUSION = Diffusion(SCHEDULE)
MEAN, STD = 0.7, 0.4  # of the Gaussian data below


def gaussian_eps(x: Tensor, timesteps: Tensor) -> Tensor:
    """The exact noise prediction where the data are N(MEAN, STD^2)."""
    sigma = SCHEDULE.t_to_sigma(timesteps.double()).reshape(-1, *[1] * (x.ndim - 1))
    abar = 1 / (1 + sigma**2)
    return (1 - abar).sqrt() * (x - abar.sqrt() * MEAN) / (abar * STD**2 + 1 - abar)


def gaussian_solution(x_t: Tensor, t: int, s: int) -> Tensor:
    """The PF-ODE keeps (x - sqrt(abar) MEAN) in units of the standard deviation at its time."""
    spread = ((ABAR[s] * STD**2 + 1 - ABAR[s]) / (ABAR[t] * STD**2 + 1 - ABAR[t])).sqrt()
    return ABAR[s].sqrt() * MEAN + spread * (x_t - ABAR[t].sqrt() * MEAN)


def test_ddim_jump_differs_from_eq_12() -> None:
    """arXiv 2010.02502 Eq. 12 with sigma_t = 0, each image with its own t and s."""
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t, s = torch.tensor([999, 500, 30]), torch.tensor([979, 480, 0])
    actual = solver_jump(DIFFUSION, lambda x, t: torch.sin(x) * t.reshape(-1, 1, 1, 1), x, t, s)
    for i in range(3):
        a_t, a_s = float(ABAR[t[i]]), float(ABAR[s[i]])
        eps = torch.sin(x[i]) * int(t[i])
        x0 = (x[i] - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
        torch.testing.assert_close(actual[i], math.sqrt(a_s) * x0 + math.sqrt(1 - a_s) * eps, rtol=1e-10, atol=1e-9)


def test_dpmpp_2s_differs_from_algorithm_1() -> None:
    """arXiv 2211.01095 Alg. 1 with r = 1/2, in its own variables (lambda, h, alpha, sigma)."""
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t, s = torch.tensor([999, 300]), torch.tensor([979, 280])
    asked: list[Tensor] = []

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return torch.tanh(x) + 0.001 * t.reshape(-1, 1, 1, 1)

    actual = solver_jump(DIFFUSION, eps_fn, x, t, s, "dpmpp_2s")
    middle = asked[1].clone()
    assert len(asked) == 2
    for i in range(2):
        a, b = float(ABAR[t[i]]), float(ABAR[s[i]])
        alpha_t, sigma_t, alpha_s, sigma_s = math.sqrt(a), math.sqrt(1 - a), math.sqrt(b), math.sqrt(1 - b)
        lambda_t, lambda_s = math.log(alpha_t / sigma_t), math.log(alpha_s / sigma_s)
        h, r = lambda_s - lambda_t, 0.5
        lambda_m = lambda_t + r * h
        alpha_m = math.sqrt(1 / (1 + math.exp(-2 * lambda_m)))
        sigma_m = alpha_m * math.exp(-lambda_m)
        assert s[i] < middle[i] < t[i]
        torch.testing.assert_close(float(SCHEDULE.t_to_sigma(middle[i])), sigma_m / alpha_m, rtol=1e-5, atol=0)
        x0 = (x[i] - sigma_t * eps_fn(x[i : i + 1], t[i : i + 1])[0]) / alpha_t
        u = sigma_m / sigma_t * x[i] - alpha_m * math.expm1(-r * h) * x0
        x0_u = (u - sigma_m * eps_fn(u[None], middle[i : i + 1])[0]) / alpha_m
        d = (1 - 1 / (2 * r)) * x0 + x0_u / (2 * r)
        expected = sigma_s / sigma_t * x[i] - alpha_s * math.expm1(-h) * d
        torch.testing.assert_close(actual[i], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmpp_2s", 2)])
def test_solver_converges_at_another_order(solver: str, order: int) -> None:
    """Half the stride must divide the error by 2^order."""
    start, end = 900, 100
    x_start = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    errors = []
    for stride in (40, 20, 10):
        x = x_start
        for t in range(start, end, -stride):
            x = solver_jump(DIFFUSION, gaussian_eps, x, torch.tensor([t]), torch.tensor([t - stride]), solver)
        errors.append(float((x - gaussian_solution(x_start, start, end)).abs().max()))
    rates = [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]
    assert rates == pytest.approx([order, order], abs=0.2)
    assert errors[-1] < (0.01 if order == 1 else 2e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jump_changes_dtype_or_drifts_in_place(solver: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    t = torch.tensor([700, 20])
    still = solver_jump(DIFFUSION, lambda x, t: torch.tanh(x), x, t, t, solver)
    assert still.dtype == dtype
    torch.testing.assert_close(still, x, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)


def test_unknown_solver_is_accepted() -> None:
    t = torch.tensor([5])
    with pytest.raises(InputError, match="unknown solver 'heun'; choose ddim, dpmpp_2s"):
        solver_jump(DIFFUSION, lambda x, t: x, torch.zeros(1, 1, 1, 1), t, t, "heun")


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmpp_2s", 2)])
def test_solver_converges_at_another_order_on_a_flow(solver: str, order: int) -> None:
    """Data N(MEAN, STD^2) under x = (1 - s) x0 + s eps: the ODE keeps (x - (1 - s) MEAN) in units of its spread."""
    flow = Diffusion(RectifiedFlow(), "flow")

    def spread(s: Tensor) -> Tensor:
        return ((1 - s) ** 2 * STD**2 + s**2).sqrt()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        s = (t / 1000).reshape(-1, 1, 1, 1)
        centred = (x - (1 - s) * MEAN) / spread(s) ** 2
        return s * centred - (MEAN + (1 - s) * STD**2 * centred)  # E[eps | x] - E[x0 | x]

    start, end = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    x_start = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(1, 1, 3, 3)
    expected = (1 - end) * MEAN + spread(end) / spread(start) * x_start
    errors = []
    for steps in (15, 30, 60):
        x, times = x_start, torch.linspace(1000, 100, steps + 1, dtype=torch.float64)
        for t, s in zip(times[:-1, None], times[1:, None], strict=True):
            x = solver_jump(flow, velocity, x, t, s, solver)
        errors.append(float((x - expected).abs().max()))
    rates = [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]
    assert rates == pytest.approx([order, order], abs=0.3)
