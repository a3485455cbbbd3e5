"""Latent consistency distillation (arXiv 2310.04378 Alg. 1).

Two neighbouring points of one teacher trajectory must lead to the same clean sample:
`d(f_online(z_t, w, c, t), f_target(z_s, w, c, s))`, where the teacher's solver jumps from `z_t` to `z_s` under w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcm_core.consistency import apply_boundary
from trainer.config import MethodConfig
from trainer.methods.shared import Network, Networks, Sample, noised, predict, teacher_jump, weighted_distance


def draw_end(t: Tensor, s: Tensor, config: MethodConfig, total: int, generator: torch.Generator) -> Tensor:
    """Always 0: consistency functions lead to the clean sample."""
    return torch.zeros_like(s)


def loss(
    networks: Networks, sample: Sample, alphas_cumprod: Tensor, config: MethodConfig, prediction_type: str
) -> Tensor:
    """The LCD loss of each sample, (B,)."""
    x_t = noised(sample, sample.t, alphas_cumprod)
    with torch.no_grad():
        x_s = teacher_jump(networks.teacher, x_t, sample, alphas_cumprod, config, prediction_type)
    return consistency_loss(networks, x_t, x_s, sample, alphas_cumprod, config, prediction_type)


def consistency_loss(
    networks: Networks,
    x_t: Tensor,
    x_s: Tensor,
    sample: Sample,
    alphas_cumprod: Tensor,
    config: MethodConfig,
    prediction_type: str,
) -> Tensor:
    """d(f_online(x_t, t), f_target(x_s, s)) of each sample, (B,), with f of Eq. 9."""

    def f(network: Network, x: Tensor, t: Tensor) -> Tensor:
        return apply_boundary(predict(network, x, t, sample, alphas_cumprod, prediction_type)[0], x, t)

    with torch.no_grad():
        aim = f(networks.target, x_s, sample.s)
    return weighted_distance(f(networks.online, x_t, sample.t), aim, sample.t, alphas_cumprod, config)
