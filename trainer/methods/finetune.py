"""Latent consistency fine-tuning (arXiv 2310.04378 Alg. 4): consistency training on one's own pictures, no teacher.

The two points come from the same picture and the same noise instead of from a teacher's jump. What arXiv 2502.01441
adds to it are settings: the Cauchy distance with c of the grid, denoising at early timesteps, and paired noise.
"""

from __future__ import annotations

from torch import Tensor

from trainer.methods.config import FinetuneConfig
from trainer.methods.lcd import consistency_loss
from trainer.methods.shared import Networks, Sample, consistency, noised, weighted_distance

EARLY = 0.25
"""Share of the timesteps, from the clean end, on which plain denoising is learnt too."""


def loss(
    networks: Networks, sample: Sample, alphas_cumprod: Tensor, config: FinetuneConfig, prediction_type: str
) -> Tensor:
    """The LCF loss of each sample, (B,), and for some of them `diffusion_weight` times that of plain denoising."""
    x_t, x_s = (noised(sample, t, alphas_cumprod) for t in (sample.t, sample.s))
    guess = consistency(networks.online, x_t, sample.t, sample, alphas_cumprod, prediction_type)
    total = consistency_loss(networks, guess, x_s, sample, alphas_cumprod, config, prediction_type)
    if config.diffusion_weight == 0:
        return total
    denoising = weighted_distance(guess, sample.x0, sample.t, alphas_cumprod, config)
    return total + config.diffusion_weight * denoising * (sample.t < EARLY * len(alphas_cumprod))
