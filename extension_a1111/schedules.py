"""The grid of noise levels in the form in which web UIs ask for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from extension_a1111.translation import Mistake, Say, english
from lcm_core.diffusion.grids import get_sigmas_lcm
from lcm_core.diffusion.process import Process, RectifiedFlow

ORIGINAL_STEPS = 50
"""Timesteps of the usual grid (arXiv 2310.04378 Sec. 4.3)."""


def get_sigmas_padded(
    process: Process,
    num_inference_steps: int,
    host_steps: int,
    original_steps: int = ORIGINAL_STEPS,
    strength: float = 1.0,
) -> Tensor:
    """`get_sigmas_lcm` for N steps at `strength`, with its first value repeated in front, (host_steps + 1,).

    A web UI makes image to image out of a longer grid: for N steps at strength s it asks for N / s and uses the last N.
    What is cut off may be anything; what is left is all N steps at exactly the noise level that was asked for.

    Raises:
        InputError: see `get_sigmas_lcm`.
    """
    sigmas = get_sigmas_lcm(process, num_inference_steps, original_steps, strength)
    return torch.cat([sigmas[:1].expand(max(host_steps - num_inference_steps, 0)), sigmas])


def flow_of_levels(name: str, levels: Tensor) -> RectifiedFlow:
    """A flow from its host's table of noise levels, (N,) rising to 1: even steps moved by a shift.

    Raises:
        InputError: another table; `name` is the model's.
    """
    table = levels.detach().cpu().double()
    half = float(table[len(table) // 2 - 1])
    if 0 < half < 1:
        process = RectifiedFlow(half / (1 - half))
        even = torch.arange(1, len(table) + 1, dtype=torch.float64) / len(table)
        if torch.allclose(table, process.shifted(even), rtol=0, atol=1e-4):
            return process
    raise Mistake("{name} has noise levels that LCM and TCD do not know; choose a sampler such as Euler", name=name)


def fit_steps(num_inference_steps: int, original_steps: int = ORIGINAL_STEPS, strength: float = 1.0) -> int:
    """The steps, of N, that the grid has left at `strength`, and at least one."""
    return max(min(num_inference_steps, int(original_steps * strength)), 1)


def fit_strength(original_steps: int, strength: float) -> float:
    """`strength`, or the least that leaves a step on a grid: that of its lowest timestep."""
    least = 1 / original_steps
    if int(original_steps * least) < 1:  # rounded to below the one step
        least = math.nextafter(least, 1)
    return max(strength, least)


def fit_remarks(asked: int, steps: int, strength: float, fitted: float, say: Say = english) -> list[str]:
    """What to tell the user whose steps or strength did not fit; nothing where they did."""
    found = []
    if steps < asked:
        words = "{asked} steps are more than the grid has at strength {strength}; {steps} were taken."
        found.append(say(words, asked=asked, strength=f"{strength:g}", steps=steps))
    if fitted > strength:
        words = "strength {strength} is below the lowest step of the grid; {fitted} was taken."
        found.append(say(words, strength=f"{strength:g}", fitted=f"{fitted:g}"))
    return found


def get_sigmas_host(process: Process, host_steps: int) -> Tensor:
    """The grid as a schedule for any sampler, (host_steps + 1,); one of more steps than usual where more are asked for.

    For image to image at a low strength hosts ask for many times the steps that they use, and must get that many.
    """
    steps = min(host_steps, process.num_train_timesteps)
    return get_sigmas_padded(process, steps, host_steps, max(ORIGINAL_STEPS, steps))
