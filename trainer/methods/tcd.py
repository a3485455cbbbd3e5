"""Trajectory consistency distillation (arXiv 2402.19159): from any point to any later one, not only to the end.

`f^{t->e}(x_t) = a_e x0 + b_e eps`, with x0 and eps as the network sees them in x_t, is the jump itself; at e = t it is
x_t, so no boundary scalings are needed. The loss compares `f_online^{t->e}(x_t)` with `f_target^{s->e}(x_s)`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.solver import solver_jump
from trainer.methods.config import TcdConfig, TeacherJumpConfig
from trainer.methods.shared import AskedNetworks, Networks, Pair, Sample, draw_pair, weighted_distance


def draw(size: int, config: TcdConfig, diffusion: Diffusion, generator: torch.Generator) -> Pair:
    """Two neighbours on the grid, and an end: even over the timesteps from 0 to the lower one, or just 0."""
    pair = draw_pair(size, config, diffusion, generator)
    end = diffusion.process.below(pair.s, torch.rand(size, generator=generator, dtype=torch.float64))
    return replace(pair, end=end * (torch.rand(size, generator=generator) >= config.clean_share))


def loss(networks: Networks, sample: Sample, d: Diffusion, config: TeacherJumpConfig) -> Tensor:
    """The loss of each sample, (B,), compared at `end`."""
    return compare(networks.given(sample), sample, d, config)


def compare(asked: AskedNetworks, sample: Sample, d: Diffusion, config: TeacherJumpConfig) -> Tensor:
    """`loss` of networks that know their conditioning."""
    t, s, end = sample.points.t, sample.points.s, sample.points.end
    online, target, teacher, _ = asked
    x_t = d.noise(sample.x0, sample.eps, t)
    with torch.no_grad():
        x_s = solver_jump(d, teacher, x_t, t, s, config.solver)
        aim = d.jump(target(x_s, s), x_s, s, end)
    return weighted_distance(d.jump(online(x_t, t), x_t, t, end), aim, t, d, config)
