"""One jump of a probability-flow ODE solver from timestep t to an earlier s, for distillation.

Samples are variance-preserving: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lcm_core.diffusion.consistency import add_noise, to_eps, to_x0
from lcm_core.diffusion.schedule import abar_from_sigma, timesteps_from_sigmas
from lcm_core.errors import InputError

SOLVERS = ("ddim", "dpmpp_2s")


def ddim_jump(x0: Tensor, eps: Tensor, abar_s: Tensor) -> Tensor:
    """x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s) eps, like x0: deterministic DDIM (arXiv 2010.02502 Eq. 12, sigma 0).

    `abar_s` broadcasts against x0, e.g. (B, 1, 1, 1).
    """
    return add_noise(x0, eps, abar_s)


def solver_jump(
    eps_fn: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    alphas_cumprod: Tensor,
    solver: str = "ddim",
) -> Tensor:
    """Solve the PF-ODE from t to s in one step: x_s, like x_t.

    Args:
        eps_fn: `eps_fn(x, timesteps)` gives the teacher's noise, already guided (arXiv 2310.04378 Eq. 15). For
            "dpmpp_2s" it is also asked at a fractional timestep between t and s.
        x_t: (B, ...).
        t, s: (B,) int64 in 0..T-1, s <= t.
        alphas_cumprod: (T,), on x_t's device, all above 0.
        solver: "ddim" (arXiv 2010.02502 Eq. 12; one call) or "dpmpp_2s" (arXiv 2211.01095 Alg. 1 with r = 1/2: second
            order, midpoint in lambda = -log sigma; two calls).

    Raises:
        InputError: unknown solver.
    """
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}; choose {', '.join(SOLVERS)}")
    precision = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    shape = (-1, *[1] * (x_t.ndim - 1))
    alphas_cumprod = alphas_cumprod.to(precision)
    abar_t, abar_s = alphas_cumprod[t].reshape(shape), alphas_cumprod[s].reshape(shape)  # (B, 1, 1, 1)
    eps = eps_fn(x_t, t)
    x0 = to_x0(eps, x_t, abar_t, "epsilon")
    if solver == "ddim":
        return ddim_jump(x0, eps, abar_s).to(x_t.dtype)
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    sigma_mid = (sigmas[t] * sigmas[s]).sqrt()  # (B,)
    abar_mid = abar_from_sigma(sigma_mid).reshape(shape)
    x_mid = ddim_jump(x0, eps, abar_mid).to(x_t.dtype)
    eps_mid = eps_fn(x_mid, timesteps_from_sigmas(sigma_mid, sigmas.log()))
    x0_mid = to_x0(eps_mid, x_mid, abar_mid, "epsilon")
    # The second-order step is DDIM's again, with the midpoint's x0 and the noise that x_t has relative to it.
    return ddim_jump(x0_mid, to_eps(x0_mid, x_t, abar_t, "sample"), abar_s).to(x_t.dtype)
