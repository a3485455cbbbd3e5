"""Latent consistency fine-tuning (arXiv 2310.04378 Alg. 4): consistency training on one's own pictures, no teacher.

The two points come from the same picture and the same noise instead of from a teacher's jump. What arXiv 2502.01441
adds to it are settings: the Cauchy distance with c of the grid, denoising at early timesteps, and paired noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from trainer.methods.config import FinetuneConfig
from trainer.methods.shared import Networks, Sample, draw_pair, weighted_distance

EARLY = 0.25
"""Share of the timesteps, from the clean end, on which plain denoising is learnt too."""

draw = draw_pair


def loss(networks: Networks, sample: Sample, d: Diffusion, config: FinetuneConfig) -> Tensor:
    """The LCF loss of each sample, (B,), and for some of them `diffusion_weight` times that of plain denoising."""
    t, s = sample.points.t, sample.points.s
    online, target, *_ = networks.given(sample)
    x_t, x_s = (d.noise(sample.x0, sample.eps, time) for time in (t, s))
    with torch.no_grad():
        aim = d.f(target(x_s, s), x_s, s)
    guess = d.f(online(x_t, t), x_t, t)
    total = weighted_distance(guess, aim, t, d, config)
    if config.diffusion_weight == 0:
        return total
    denoising = weighted_distance(guess, sample.x0, t, d, config)
    return total + config.diffusion_weight * denoising * (t < EARLY * d.process.num_train_timesteps)
