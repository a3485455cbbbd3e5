"""Latent consistency fine-tuning (arXiv 2310.04378 Alg. 4): consistency training on one's own pictures, no teacher.

The two points come from the same picture and the same noise instead of from a teacher's jump.
"""

from __future__ import annotations

from torch import Tensor

from trainer.config import MethodConfig
from trainer.methods.lcd import consistency_loss
from trainer.methods.shared import Networks, Sample, noised


def loss(
    networks: Networks, sample: Sample, alphas_cumprod: Tensor, config: MethodConfig, prediction_type: str
) -> Tensor:
    """The LCF loss of each sample, (B,)."""
    x_t, x_s = (noised(sample, t, alphas_cumprod) for t in (sample.t, sample.s))
    return consistency_loss(networks, x_t, x_s, sample, alphas_cumprod, config, prediction_type)
