"""One jump of a probability-flow ODE solver from timestep t to an earlier s, for distillation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion, per_sample, to_eps, to_x0
from lcm_core.errors import InputError

SOLVERS = ("ddim", "dpmpp_2s")


def solver_jump(
    diffusion: Diffusion,
    model: Callable[[Tensor, Tensor], Tensor],
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    solver: str = "ddim",
) -> Tensor:
    """Solve the PF-ODE from t to s in one step: x_s, like x_t.

    Args:
        model: `model(x, timesteps)` gives the teacher's output, already guided (arXiv 2310.04378 Eq. 15). For
            "dpmpp_2s" it is also asked at a fractional timestep between t and s.
        x_t: (B, ...).
        t, s: (B,), s <= t.
        solver: "ddim" (arXiv 2010.02502 Eq. 12; one call) or "dpmpp_2s" (arXiv 2211.01095 Alg. 1 with r = 1/2: second
            order, midpoint in lambda = -log(b / a); two calls).

    Raises:
        InputError: unknown solver.
    """
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}; choose {', '.join(SOLVERS)}")
    wide = x_t if x_t.dtype == torch.float64 else x_t.float()
    output = model(x_t, t).to(wide.dtype)
    if solver == "ddim":
        return diffusion.jump(output, wide, t, s).to(x_t.dtype)
    process, kind = diffusion.process, diffusion.prediction_type
    (a_t, b_t), (a_s, b_s) = (process.coefficients(time) for time in (t, s))
    sigma = process.ratio_to_sigma(((b_t / a_t) * (b_s / a_s)).sqrt())  # (B,), half-way in lambda
    a, b = (per_sample(scale.to(wide.dtype), wide) for scale in process.network_scales(sigma))
    x_mid = a * diffusion.x0(output, wide, t) + b * diffusion.eps(output, wide, t)
    output_mid = model(x_mid.to(x_t.dtype), process.sigma_to_t(sigma)).to(wide.dtype)
    x0 = to_x0(output_mid, x_mid, a, b, kind)
    # The second-order step is DDIM's again, with the midpoint's x0 and the noise that x_t has relative to it.
    eps = to_eps(x0, wide, *diffusion.scales(t, wide), "sample")
    return diffusion.noise(x0, eps, s).to(x_t.dtype)
