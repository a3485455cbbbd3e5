"""Latent consistency distillation (arXiv 2310.04378 Alg. 1).

Two neighbouring points of one teacher trajectory must lead to the same clean sample:
`d(f_online(z_t, w, c, t), f_target(z_s, w, c, s))`, where the teacher's solver jumps from `z_t` to `z_s` under w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.methods.config import ConsistencyConfig, LcdConfig
from trainer.methods.shared import (
    Networks,
    Points,
    Sample,
    consistency,
    draw_timesteps,
    noised,
    teacher_jump,
    weighted_distance,
)


def draw(size: int, config: ConsistencyConfig, alphas_cumprod: Tensor, generator: torch.Generator) -> Points:
    """Two neighbours on the grid; the end is always 0, for consistency functions lead to the clean sample."""
    t, s = draw_timesteps(size, config, alphas_cumprod, generator)
    return Points(t, s, torch.zeros_like(s))


def loss(networks: Networks, sample: Sample, alphas_cumprod: Tensor, config: LcdConfig, prediction_type: str) -> Tensor:
    """The LCD loss of each sample, (B,)."""
    x_t = noised(sample, sample.t, alphas_cumprod)
    with torch.no_grad():
        x_s = teacher_jump(networks.teacher, x_t, sample, alphas_cumprod, config, prediction_type)
    guess = consistency(networks.online, x_t, sample.t, sample, alphas_cumprod, prediction_type)
    return consistency_loss(networks, guess, x_s, sample, alphas_cumprod, config, prediction_type)


def consistency_loss(
    networks: Networks,
    guess: Tensor,
    x_s: Tensor,
    sample: Sample,
    alphas_cumprod: Tensor,
    config: ConsistencyConfig,
    prediction_type: str,
) -> Tensor:
    """d(guess, f_target(x_s, s)) of each sample, (B,), where the guess is f_online(x_t, t)."""
    with torch.no_grad():
        aim = consistency(networks.target, x_s, sample.s, sample, alphas_cumprod, prediction_type)
    return weighted_distance(guess, aim, sample.t, alphas_cumprod, config)
