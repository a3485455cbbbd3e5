"""Latent consistency distillation (arXiv 2310.04378 Alg. 1).

Two neighbouring points of one teacher trajectory must lead to the same clean sample:
`d(f_online(x_t, w, c, t), f_target(x_s, w, c, s))`, where the teacher's solver jumps from `x_t` to `x_s` under w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.solver import solver_jump
from trainer.methods.config import LcdConfig
from trainer.methods.shared import Networks, Sample, draw_pair, weighted_distance

draw = draw_pair


def loss(networks: Networks, sample: Sample, d: Diffusion, config: LcdConfig) -> Tensor:
    """The LCD loss of each sample, (B,)."""
    t, s = sample.points.t, sample.points.s
    online, target, teacher, _ = networks.given(sample)
    x_t = d.noise(sample.x0, sample.eps, t)
    with torch.no_grad():
        x_s = solver_jump(d, teacher, x_t, t, s, config.solver)
        aim = d.f(target(x_s, s), x_s, s)
    return weighted_distance(d.f(online(x_t, t), x_t, t), aim, t, d, config)
