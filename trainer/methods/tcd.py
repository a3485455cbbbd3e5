"""Trajectory consistency distillation (arXiv 2402.19159): from any point to any later one, not only to the end.

`f^{t->e}(x_t) = sqrt(abar_e) x0 + sqrt(1 - abar_e) eps`, with x0 and eps as the network sees them in x_t; at e = t it
is x_t itself, so no boundary scalings are needed. The loss compares `f_online^{t->e}(x_t)` with `f_target^{s->e}(x_s)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcm_core.diffusion.solver import ddim_jump
from trainer.methods.config import TcdConfig, TeacherJumpConfig
from trainer.methods.shared import (
    Network,
    Networks,
    Points,
    Sample,
    at,
    draw_timesteps,
    noised,
    predict,
    teacher_jump,
    weighted_distance,
)


def draw(size: int, config: TcdConfig, alphas_cumprod: Tensor, generator: torch.Generator) -> Points:
    """Two neighbours on the grid, and an end: even over the timesteps from 0 to the lower one, or just 0."""
    t, s = draw_timesteps(size, config, alphas_cumprod, generator)
    end = (torch.rand(s.shape, generator=generator, dtype=torch.float64) * (s + 1)).long()
    return Points(t, s, end * (torch.rand(s.shape, generator=generator) >= config.clean_share))


def loss(
    networks: Networks, sample: Sample, alphas_cumprod: Tensor, config: TeacherJumpConfig, prediction_type: str
) -> Tensor:
    """The loss of each sample, (B,), compared at `sample.end`."""

    def f(network: Network, x: Tensor, t: Tensor) -> Tensor:
        x0, eps = predict(network, x, t, sample, alphas_cumprod, prediction_type)
        return ddim_jump(x0, eps, at(alphas_cumprod, sample.end))

    x_t = noised(sample, sample.t, alphas_cumprod)
    with torch.no_grad():
        x_s = teacher_jump(networks.teacher, x_t, sample, alphas_cumprod, config, prediction_type)
        aim = f(networks.target, x_s, sample.s)
    return weighted_distance(f(networks.online, x_t, sample.t), aim, sample.t, alphas_cumprod, config)
