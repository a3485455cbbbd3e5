"""Samplers `lcm_suite` and `tcd_suite` and the schedule `lcm_grid` in the lists of the host's own sampling nodes."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.k_diffusion.sampling
import comfy.samplers
from torch import Tensor

from lcm_core.diffusion.grids import get_sigmas_lcm

from .model_patches import LcmSampling, is_stock_lcm, process_of
from .sampling import sample

SAMPLERS = {"lcm_suite": "lcm", "tcd_suite": "tcd"}
"""Names in the host's lists, and what they are here."""
SCHEDULER = "lcm_grid"


def register() -> None:
    """Add ours to the lists of a host that is starting. Once is enough; more does no harm."""
    for name, own in SAMPLERS.items():
        # The host looks a sampler's function up by this name.
        setattr(comfy.k_diffusion.sampling, f"sample_{name}", partial(sample, name=own))
        for known in (comfy.samplers.KSAMPLER_NAMES, comfy.samplers.SAMPLER_NAMES):
            if name not in known:
                known.append(name)
    comfy.samplers.SCHEDULER_HANDLERS[SCHEDULER] = comfy.samplers.SchedulerHandler(lcm_grid)
    if SCHEDULER not in comfy.samplers.SCHEDULER_NAMES:
        comfy.samplers.SCHEDULER_NAMES.append(SCHEDULER)


def lcm_grid(sampling: Any, steps: int) -> Tensor:
    """LCMScheduler's noise levels, falling and ending in 0, (steps + 1,).

    Of the host's own node for LCM, which keeps only levels of the grid, "simple" takes the right ones.

    Raises:
        InputError: more steps than the grid has timesteps, or a model of another kind.
    """
    if is_stock_lcm(sampling):
        levels: Tensor = comfy.samplers.simple_scheduler(sampling, steps)
        return levels
    original_steps = sampling.diffusion.original_steps if isinstance(sampling, LcmSampling) else 50
    return get_sigmas_lcm(process_of(sampling), steps, original_steps)
