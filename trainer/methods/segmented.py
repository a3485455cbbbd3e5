"""Segmented, or phased, consistency distillation (PCM, arXiv 2405.18407; TSCD of Hyper-SD, arXiv 2404.13686).

The trajectory is cut into phases, and within each the student leads to the phase's own end: the loss of `tcd` with the
end fixed. The edges are the timesteps that a sampler of as many steps visits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.methods.config import SegmentedConfig
from trainer.methods.shared import Points, draw_timesteps


def phase_edges(config: SegmentedConfig, total: int) -> Tensor:
    """Where the phases end, (phases,) int64 rising from 0: the edge of phase p is grid point ceil(p N / phases).

    With N = 50 and four phases: 0, 259, 499, 759, the lower ones of the four timesteps of `get_timesteps_lcm`.
    """
    points = -(-torch.arange(config.phases) * config.original_steps // config.phases)  # rounded up
    return (points * (total // config.original_steps) - 1).clamp(min=0)


def draw(size: int, config: SegmentedConfig, alphas_cumprod: Tensor, generator: torch.Generator) -> Points:
    """Two neighbours on the grid, and the end of the phase that the upper one lies in: the greatest edge below it."""
    t, s = draw_timesteps(size, config, alphas_cumprod, generator)
    end = phase_end(t, config, len(alphas_cumprod))
    return Points(t, torch.maximum(s, end), end)  # a jump from a shifted grid must not leave its phase


def phase_end(t: Tensor, config: SegmentedConfig, total: int) -> Tensor:
    """The end of the phase that t lies in, (B,) int64; 0 for t = 0."""
    edges = phase_edges(config, total)
    return edges[(torch.searchsorted(edges, t) - 1).clamp(min=0)]
