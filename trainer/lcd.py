"""Latent consistency distillation (arXiv 2310.04378 Alg. 1).

Two neighbouring points of one teacher trajectory must lead to the same clean sample:
`d(f_online(z_t, w, c, t), f_target(z_s, w, c, s))`, where the teacher's solver jumps from `z_t` to `z_s` under w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lcm_core.consistency import add_noise, consistency_function, to_eps
from lcm_core.errors import InputError
from lcm_core.solver import solver_jump
from trainer.distances import distance

Student = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x_t (B, 4, h, w), timesteps (B,), context (B, L, D), w (B,)) -> model output (B, 4, h, w)."""
Teacher = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, timesteps, context) -> model output."""


@dataclass(frozen=True)
class LCDConfig:
    original_steps: int = 50
    """Timesteps on the student's grid; the skip is the distance between two of them, k = T // original_steps."""
    w_min: float = 2.0
    """Smallest guidance w = guidance_scale - 1 that the student learns."""
    w_max: float = 14.0
    """Largest guidance w; equal to `w_min` for one fixed guidance."""
    solver: str = "ddim"
    """The teacher's solver: ddim or dpmpp_2s."""
    loss: str = "huber"
    """Distance between the two predictions: l2, huber or cauchy."""
    huber_c: float = 0.001
    """The c of the Huber and Cauchy distances."""
    prediction_type: str = "epsilon"
    """What teacher and student predict: epsilon, v_prediction or sample."""


def draw_timesteps(size: int, config: LCDConfig, total: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(t, s), each (B,) int64: t on the skipping grid and s one skip below it, at least 0."""
    if not 1 <= config.original_steps <= total:
        raise InputError(f"original_steps={config.original_steps} must be 1 to {total}")
    skip = total // config.original_steps
    t = torch.randint(1, config.original_steps + 1, (size,), generator=generator) * skip - 1
    return t, (t - skip).clamp(min=0)


def draw_guidance(size: int, config: LCDConfig, generator: torch.Generator) -> Tensor:
    """w of each sample, (B,), even over [w_min, w_max]."""
    return config.w_min + (config.w_max - config.w_min) * torch.rand(size, generator=generator)


def guided_eps(
    teacher: Teacher, context: Tensor, null_context: Tensor, w: Tensor, config: LCDConfig, abar: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The augmented PF-ODE's noise `(1 + w) eps(z, c, t) - w eps(z, null, t)` (Eq. 15), both in one doubled batch."""
    both = torch.cat([context, null_context.expand_as(context)])
    w = w.view(-1, 1, 1, 1)

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        output = teacher(torch.cat([x, x]), torch.cat([t, t]), both)
        level = interpolate_abar(abar, t).view(-1, 1, 1, 1)
        eps_cond, eps_null = (to_eps(half, x, level, config.prediction_type) for half in output.chunk(2))
        return torch.lerp(eps_null, eps_cond, (1 + w).to(x.dtype))

    return eps_fn


def interpolate_abar(abar: Tensor, t: Tensor) -> Tensor:
    """alphas_cumprod (T,) at whole or fractional timesteps (B,), straight in log sigma as samplers do."""
    if not t.is_floating_point():
        return abar[t]
    log_sigma = (((1 - abar) / abar).log()) / 2
    low = t.floor().long().clamp(0, len(abar) - 2)
    return torch.sigmoid(-2 * torch.lerp(log_sigma[low], log_sigma[low + 1], t - low))


def lcd_loss(
    online: Student,
    target: Student,
    teacher: Teacher,
    x0: Tensor,
    context: Tensor,
    null_context: Tensor,
    alphas_cumprod: Tensor,
    config: LCDConfig,
    generator: torch.Generator,
) -> Tensor:
    """The LCD loss of one batch, a scalar.

    Args:
        online, target, teacher: networks; only `online` receives a gradient.
        x0: clean latents (B, 4, h, w).
        context, null_context: text embeddings (B, L, D) and the empty prompt's (1, L, D).
        alphas_cumprod: (T,), float32 on x0's device.
        generator: on the CPU; draws timesteps, guidance and noise.
    """
    device = x0.device
    t, s = (v.to(device) for v in draw_timesteps(len(x0), config, len(alphas_cumprod), generator))
    w = draw_guidance(len(x0), config, generator).to(device)
    eps = torch.randn(x0.shape, generator=generator).to(device)
    abar_t, abar_s = (alphas_cumprod[v].view(-1, 1, 1, 1) for v in (t, s))
    x_t = add_noise(x0, eps, abar_t)
    with torch.no_grad():
        eps_fn = guided_eps(teacher, context, null_context, w, config, alphas_cumprod)
        x_s = solver_jump(eps_fn, x_t, t, s, alphas_cumprod, config.solver)
        aim = consistency_function(target(x_s, s, context, w), x_s, s, abar_s, config.prediction_type)
    guess = consistency_function(online(x_t, t, context, w), x_t, t, abar_t, config.prediction_type)
    return distance(guess, aim, config.loss, config.huber_c).mean()
