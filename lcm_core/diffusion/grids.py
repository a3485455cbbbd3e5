"""Grids: the noise levels that a sampler visits, as sigmas (N + 1,) that fall and end in 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lcm_core.diffusion.process import Process, RectifiedFlow, VariancePreserving, stable_diffusion
from lcm_core.errors import InputError


def get_timesteps_lcm(
    num_inference_steps: int, original_steps: int = 50, strength: float = 1.0, process: Process | None = None
) -> Tensor:
    """The skipping grid of latent consistency models (arXiv 2310.04378 Sec. 4.3), (N,), falling.

    Distillation saw `original_steps` timesteps, `k = T // original_steps` apart; N of them, evenly spaced by index,
    are visited. Image to image with `strength` uses only the lowest `int(original_steps * strength)` of them, so that
    all N steps are run and the first noise level is the strength that was asked for. Equal to diffusers' LCMScheduler.

    A rectified flow knows all of [0, T], so its points are exactly even before the shift: T * strength * (1 - i / N).

    Args:
        process: None is Stable Diffusion's. int64 where it is variance-preserving, float64 where it is a flow.

    Raises:
        InputError: a number out of its range, or fewer grid points left by `strength` than steps.
    """
    process = process or stable_diffusion()
    _check_steps(num_inference_steps)
    _check_strength(strength)
    if not 1 <= original_steps <= process.num_train_timesteps:
        raise InputError(
            f"original_steps={original_steps} must be 1 to {process.num_train_timesteps}, the training timesteps"
        )
    if isinstance(process, RectifiedFlow):
        even = 1 - torch.arange(num_inference_steps, dtype=torch.float64) / num_inference_steps
        return process.grid(original_steps * strength * even, original_steps)
    if num_inference_steps > original_steps:
        raise InputError(
            f"{num_inference_steps} steps are more than original_steps={original_steps}; "
            f"use at most {original_steps} steps or raise original_steps"
        )
    available = int(original_steps * strength)
    if available < num_inference_steps:
        raise InputError(
            f"{num_inference_steps} steps at strength={strength} need more than the {available} timesteps that "
            f"original_steps={original_steps} leaves; use at most {max(available, 1)} steps, strength of at least "
            f"{num_inference_steps / original_steps:g}, or raise original_steps"
        )
    stride = available / num_inference_steps
    return process.grid(torch.tensor([available - int(i * stride) for i in range(num_inference_steps)]), original_steps)


def get_sigmas_lcm(
    process: Process,
    num_inference_steps: int | None,
    original_steps: int = 50,
    strength: float = 1.0,
    timesteps: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Sigmas of `get_timesteps_lcm`, or of your own `timesteps`, (N + 1,) float32, falling and ending in 0.

    Args:
        num_inference_steps: N; may be None when `timesteps` are given.
        timesteps: strictly falling, whole numbers inside 0..T-1, or for a flow any inside (0, T]; of these `strength`
            keeps the last `int(N * strength)`.

    Raises:
        InputError: see `get_timesteps_lcm`; or timesteps out of order or range, or not N of them.
    """
    if timesteps is None:
        if num_inference_steps is None:
            raise InputError("neither num_inference_steps nor timesteps was given; give one of them")
        return _sigmas_at(process, get_timesteps_lcm(num_inference_steps, original_steps, strength, process))
    grid = torch.as_tensor(timesteps)
    if num_inference_steps not in (None, len(grid)):
        raise InputError(f"num_inference_steps={num_inference_steps} but {len(grid)} timesteps; leave out one of them")
    return _sigmas_at(process, grid, strength)


def get_sigmas_trailing(
    process: Process, num_inference_steps: int, strength: float = 1.0, terminal: float | None = None
) -> Tensor:
    """diffusers' "trailing" spacing: T - 1, then down in even strides of T / N; (N + 1,) float32, ending in 0.

    The best grid for few steps (arXiv 2305.08891 Table 2). `strength` < 1 keeps the last `int(N * strength)` steps.
    For a flow it is T, then down in even strides, all shifted. With `terminal` they are then stretched away from pure
    noise, so that the last step begins at sigma `terminal` (diffusers' `shift_terminal`).

    Raises:
        InputError: N outside 1..T, strength outside (0, 1] or so low that no step is left.
    """
    total = process.num_train_timesteps
    _check_steps(num_inference_steps, total)
    if isinstance(process, RectifiedFlow):
        timesteps = get_timesteps_lcm(num_inference_steps, process=process)
        if terminal is not None and num_inference_steps > 1:
            left = 1 - timesteps / total
            timesteps = total * (1 - left * (1 - terminal) / left[-1])
        return _sigmas_at(process, timesteps, strength)
    stride = total / num_inference_steps
    return _sigmas_at(process, [round(total - i * stride) - 1 for i in range(num_inference_steps)], strength)


def get_sigmas_leading(
    process: VariancePreserving,
    num_inference_steps: int,
    strength: float = 1.0,
    steps_offset: int = 1,
    drop_last: bool = False,
) -> Tensor:
    """diffusers' "leading" spacing: multiples of T // N, plus `steps_offset` (1 for Stable Diffusion).

    DDIMScheduler's grid; `drop_last` gives DPMSolverMultistepScheduler's, made for N + 1 steps without the last one.
    Returns (N + 1,) float32, ending in 0.

    Raises:
        InputError: as `get_sigmas_trailing`, or an offset that leaves 0..T-1.
    """
    _check_steps(num_inference_steps, process.num_train_timesteps - drop_last)
    stride = process.num_train_timesteps // (num_inference_steps + drop_last)
    first = int(drop_last)
    grid = [(first + i) * stride + steps_offset for i in reversed(range(num_inference_steps))]
    if grid[0] >= process.num_train_timesteps:
        raise InputError(
            f"{num_inference_steps} steps with steps_offset={steps_offset} would start at t = {grid[0]}, behind the "
            f"last timestep {process.num_train_timesteps - 1}; use fewer steps or steps_offset=0"
        )
    return _sigmas_at(process, grid, strength)


def get_sigmas_linspace(
    process: VariancePreserving, num_inference_steps: int, strength: float = 1.0, drop_last: bool = False
) -> Tensor:
    """diffusers' "linspace" spacing: N points from T - 1 to 0, both included; (N + 1,) float32, ending in 0.

    DDIMScheduler's grid; `drop_last` gives DPMSolverMultistepScheduler's, made for N + 1 steps without the last one.

    Raises:
        InputError: as `get_sigmas_trailing`, or a single step, which would sit at t = 0.
    """
    total = process.num_train_timesteps
    _check_steps(num_inference_steps, total - drop_last)
    gaps = num_inference_steps - 1 + drop_last
    if gaps == 0:
        raise InputError("1 step with linspace spacing would start at t = 0; use trailing spacing or drop_last=True")
    stride = (total - 1) / gaps
    grid = [round((i + drop_last) * stride) for i in reversed(range(num_inference_steps))]
    return _sigmas_at(process, grid, strength)


def _sigmas_at(process: Process, timesteps: Sequence[float] | Tensor, strength: float = 1.0) -> Tensor:
    grid = torch.as_tensor(timesteps).cpu()
    given = ", ".join(f"{t:g}" for t in grid.flatten()[:8].tolist()) + (", ..." if grid.numel() > 8 else "")
    is_flow = isinstance(process, RectifiedFlow)
    kind = "numbers" if is_flow else "whole numbers"
    if grid.ndim != 1 or len(grid) == 0 or (grid.is_floating_point() and not is_flow):
        raise InputError(f"timesteps [{given}] must be a list of one or more {kind}")
    total = process.num_train_timesteps
    inside = grid[-1] > 0 and grid[0] <= total if is_flow else grid[-1] >= 0 and grid[0] < total
    if not bool((grid.diff() < 0).all()) or not bool(inside):
        allowed = f"(0, {total}]" if is_flow else f"0..{total - 1}"
        raise InputError(f"timesteps [{given}] must fall strictly and lie in {allowed}")
    _check_strength(strength)
    kept = int(len(grid) * strength)
    if kept == 0:
        raise InputError(
            f"strength={strength} leaves none of {len(grid)} steps; "
            f"use strength of at least {1 / len(grid):g} or more steps"
        )
    sigmas = process.sigmas_at(grid[len(grid) - kept :])
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def _check_steps(num_inference_steps: int, most: int | None = None) -> None:
    if num_inference_steps < 1:
        raise InputError(f"{num_inference_steps} steps is too few; use 1 or more")
    if most is not None and num_inference_steps > most:
        raise InputError(f"{num_inference_steps} steps are more than the schedule's {most}; use at most {most}")


def _check_strength(strength: float) -> None:
    if not 0 < strength <= 1:
        raise InputError(f"strength={strength} is outside (0, 1]; use 1 for a new image, less to keep more of the old")
