"""Flow map distillation: tcd for a student that is told where each jump ends (CTM, arXiv 2310.02279).

tcd's network answers alike wherever a jump ends, and settles between all ends. Told the end, it can learn each: the
jump to the clean picture that one step needs, and the short ones that approach the teacher's own trajectory.
"""

from __future__ import annotations

from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from trainer.methods.config import FlowMapConfig
from trainer.methods.shared import Networks, Sample
from trainer.methods.tcd import compare


def loss(networks: Networks, sample: Sample, d: Diffusion, config: FlowMapConfig) -> Tensor:
    """The loss of each sample, (B,), compared at `end`, which online and target network are told."""
    end = sample.points.end / d.process.num_train_timesteps
    return compare(networks.given(sample, end), sample, d, config)
