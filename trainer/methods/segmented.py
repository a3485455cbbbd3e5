"""Segmented, or phased, consistency distillation (PCM, arXiv 2405.18407; TSCD of Hyper-SD, arXiv 2404.13686).

The trajectory is cut into phases, and within each the student leads to the phase's own end: the loss of `tcd` with the
end fixed. The edges are the timesteps that a sampler of as many steps visits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_timesteps_lcm
from trainer.methods.config import SegmentedConfig
from trainer.methods.shared import Pair, draw_pair


def phase_edges(config: SegmentedConfig, diffusion: Diffusion) -> Tensor:
    """Where the phases end, (phases,) rising from 0: 0, and the lower timesteps of `get_timesteps_lcm`.

    With N = 50 and four phases these are 0, 259, 499, 759 for Stable Diffusion.
    """
    visited = get_timesteps_lcm(config.phases, diffusion.original_steps, process=diffusion.process).flip(0)
    return torch.cat([torch.zeros_like(visited[:1]), visited[:-1]])


def draw(size: int, config: SegmentedConfig, diffusion: Diffusion, generator: torch.Generator) -> Pair:
    """Two neighbours on the grid, and the end of the phase that the upper one lies in: the greatest edge below it."""
    pair = draw_pair(size, config, diffusion, generator)
    end = phase_end(pair.t, phase_edges(config, diffusion))
    return Pair(pair.t, torch.maximum(pair.s, end), end)  # a jump from a shifted grid must not leave its phase


def phase_end(t: Tensor, edges: Tensor) -> Tensor:
    """The end of the phase that t lies in, same shape; 0 for t = 0."""
    return edges[(torch.searchsorted(edges, t) - 1).clamp(min=0)]
