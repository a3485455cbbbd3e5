"""Noise schedules, and the grids of timesteps and sigmas that samplers walk along.

Two coordinates name the same noise level of a variance-preserving diffusion `x_t = sqrt(abar) x0 + sqrt(1 - abar) eps`:
the timestep `t` in 0..T-1, and `sigma = sqrt((1 - abar) / abar)`, the noise in units of the signal. Samplers use sigma,
networks are asked at t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lcm_core.errors import InputError

# A zero-terminal-SNR schedule ends in abar = 0, so in an infinite sigma. This stand-in (ComfyUI's) gives sigma 4518.8,
# which half precision can still hold; a v-predicting network sees a signal of 2e-4 instead of none.
ZERO_SNR_ABAR = 4.8973451890853435e-08
# Timesteps are rounded to this fraction of one: float32 sigmas give them to about 1e-4 only, and a network asked at
# 998.9999 would not answer quite as it does at 999.
_PARTS = 512


def get_alphas_cumprod(
    schedule: str = "scaled_linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> Tensor:
    """Cumulative signal fraction abar of a named training schedule, (T,) float64, falling.

    Args:
        schedule: "scaled_linear" (Stable Diffusion), "linear" (DDPM, arXiv 2006.11239) or "cosine" (arXiv 2102.09672
            Eq. 17, beta capped at 0.999; the betas are not used).
        zero_terminal_snr: shift and scale so that the last abar is exactly 0 (arXiv 2305.08891 Alg. 1).

    Raises:
        InputError: unknown schedule, fewer than 2 timesteps, or betas outside 0 < start <= end < 1.
    """
    if num_train_timesteps < 2:
        raise InputError(f"num_train_timesteps={num_train_timesteps} is too few; use 2 or more")
    if not 0 < beta_start <= beta_end < 1:
        raise InputError(f"beta_start={beta_start}, beta_end={beta_end} must satisfy 0 < beta_start <= beta_end < 1")
    if schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    elif schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    elif schedule == "cosine":
        time = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    else:
        raise InputError(f"unknown noise schedule {schedule!r}; choose scaled_linear, linear or cosine")
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    return rescale_zero_terminal_snr(alphas_cumprod) if zero_terminal_snr else alphas_cumprod


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(abar), (T,), so that its last value is 0 and its first stays (arXiv 2305.08891 Alg. 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def timesteps_from_sigmas(sigma: Tensor, log_sigmas: Tensor) -> Tensor:
    """Timesteps of any sigmas, same shape, by interpolation in log sigma; whole numbers exactly on grid points.

    Args:
        sigma: noise levels; those outside the table give its first or last timestep (0 and inf included).
        log_sigmas: (T,) rising table, on sigma's device.

    Nothing is read back from the device.
    """
    log_sigma = sigma.log()
    low = torch.searchsorted(log_sigmas[1:-1], log_sigma, right=True)  # 0..T-2, so that low + 1 exists
    floor = torch.take(log_sigmas, low)
    fraction = (log_sigma - floor) / (torch.take(log_sigmas, low + 1) - floor)
    return ((low + fraction.clamp(0, 1)) * _PARTS).round() / _PARTS


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The training noise levels of one model, and the way between timestep and sigma.

    `NoiseSchedule(get_alphas_cumprod())` is Stable Diffusion's. Any falling `alphas_cumprod` in [0, 1] will do; it is
    kept on the CPU in float64. A last value of 0 (zero-terminal SNR) is replaced by `ZERO_SNR_ABAR`, because an
    infinite sigma cannot be computed with; `zero_terminal_snr` remembers it.

    Raises:
        InputError: not one-dimensional, fewer than 2 values, not strictly falling, or outside [0, 1].
    """

    alphas_cumprod: Tensor  # (T,)
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        abar = torch.as_tensor(self.alphas_cumprod).detach().to("cpu", torch.float64).clone()
        if abar.ndim != 1 or len(abar) < 2:
            raise InputError(f"alphas_cumprod of shape {tuple(abar.shape)} is no schedule; give one row of 2 or more")
        if not bool((abar.diff() < 0).all()) or abar[0] > 1 or abar[-1] < 0:
            raise InputError(
                "alphas_cumprod must fall strictly and lie in [0, 1]; check for NaN or a reversed schedule"
            )
        if abar[-1] < 1e-12:
            abar[-1] = min(ZERO_SNR_ABAR, float(abar[-2]) / 2)
        object.__setattr__(self, "alphas_cumprod", abar)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> Tensor:
        """sqrt((1 - abar) / abar) of every timestep, (T,) float64 on the CPU, rising."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @cached_property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep carries (almost) no signal, so that x0 cannot be computed from eps there."""
        return bool(self.alphas_cumprod[-1] <= ZERO_SNR_ABAR * 1.001 and self.alphas_cumprod[-2] < 1e-6)

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Timesteps of `sigma`, same shape and device, in sigma's precision but at least float32; see
        `timesteps_from_sigmas`."""
        sigma = sigma if sigma.dtype == torch.float64 else sigma.float()
        return timesteps_from_sigmas(sigma, self._log_sigmas(sigma.device, sigma.dtype))

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigmas of timesteps `t` (whole or fractional, in 0..T-1), same shape and device; float32, float64 if t is."""
        dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
        log_sigmas = self._log_sigmas(t.device, dtype)
        low = t.floor().long().clamp(0, len(log_sigmas) - 2)
        return torch.lerp(torch.take(log_sigmas, low), torch.take(log_sigmas, low + 1), (t - low).to(dtype)).exp()

    def _log_sigmas(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        # Moved once per device: a copy inside every step would wait for the device.
        if (device, dtype) not in self._tables:
            self._tables[device, dtype] = self.sigmas.log().to(device, dtype)
        return self._tables[device, dtype]


def abar_from_sigma(sigma: Tensor) -> Tensor:
    """abar = 1 / (1 + sigma^2), same shape."""
    return 1 / (1 + sigma * sigma)


def get_timesteps_lcm(
    num_inference_steps: int, original_steps: int = 50, strength: float = 1.0, num_train_timesteps: int = 1000
) -> Tensor:
    """The skipping grid of latent consistency models (arXiv 2310.04378 Sec. 4.3), (N,) int64, falling.

    Distillation saw `original_steps` timesteps, `k = T // original_steps` apart; N of them, evenly spaced by index,
    are visited. Image to image with `strength` uses only the lowest `int(original_steps * strength)` of them, so that
    all N steps are run and the first noise level is the strength that was asked for. Equal to diffusers' LCMScheduler.

    Raises:
        InputError: a number out of its range, or fewer grid points left by `strength` than steps.
    """
    _check_steps(num_inference_steps)
    _check_strength(strength)
    if not 1 <= original_steps <= num_train_timesteps:
        raise InputError(f"original_steps={original_steps} must be 1 to {num_train_timesteps}, the training timesteps")
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
    k = num_train_timesteps // original_steps
    stride = available / num_inference_steps
    return torch.tensor([(available - int(i * stride)) * k - 1 for i in range(num_inference_steps)])


def get_sigmas_lcm(
    schedule: NoiseSchedule,
    num_inference_steps: int | None,
    original_steps: int = 50,
    strength: float = 1.0,
    timesteps: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Sigmas of `get_timesteps_lcm`, or of your own `timesteps`, (N + 1,) float32, falling and ending in 0.

    Args:
        num_inference_steps: N; may be None when `timesteps` are given.
        timesteps: strictly falling, inside 0..T-1; of these `strength` keeps the last `int(N * strength)`.

    Raises:
        InputError: see `get_timesteps_lcm`; or timesteps out of order or range, or not N of them.
    """
    total = schedule.num_train_timesteps
    if timesteps is None:
        if num_inference_steps is None:
            raise InputError("neither num_inference_steps nor timesteps was given; give one of them")
        return _sigmas_at(schedule, get_timesteps_lcm(num_inference_steps, original_steps, strength, total))
    grid = torch.as_tensor(timesteps)
    if num_inference_steps not in (None, len(grid)):
        raise InputError(f"num_inference_steps={num_inference_steps} but {len(grid)} timesteps; leave out one of them")
    return _sigmas_at(schedule, grid, strength)


def get_sigmas_trailing(schedule: NoiseSchedule, num_inference_steps: int, strength: float = 1.0) -> Tensor:
    """diffusers' "trailing" spacing: T - 1, then down in even strides of T / N; (N + 1,) float32, ending in 0.

    The best grid for few steps (arXiv 2305.08891 Table 2). `strength` < 1 keeps the last `int(N * strength)` steps.

    Raises:
        InputError: N outside 1..T, strength outside (0, 1] or so low that no step is left.
    """
    total = schedule.num_train_timesteps
    _check_steps(num_inference_steps, total)
    stride = total / num_inference_steps
    return _sigmas_at(schedule, [round(total - i * stride) - 1 for i in range(num_inference_steps)], strength)


def get_sigmas_leading(
    schedule: NoiseSchedule,
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
    _check_steps(num_inference_steps, schedule.num_train_timesteps - drop_last)
    stride = schedule.num_train_timesteps // (num_inference_steps + drop_last)
    first = int(drop_last)
    grid = [(first + i) * stride + steps_offset for i in reversed(range(num_inference_steps))]
    if grid[0] >= schedule.num_train_timesteps:
        raise InputError(
            f"{num_inference_steps} steps with steps_offset={steps_offset} would start at t = {grid[0]}, behind the "
            f"last timestep {schedule.num_train_timesteps - 1}; use fewer steps or steps_offset=0"
        )
    return _sigmas_at(schedule, grid, strength)


def get_sigmas_linspace(
    schedule: NoiseSchedule, num_inference_steps: int, strength: float = 1.0, drop_last: bool = False
) -> Tensor:
    """diffusers' "linspace" spacing: N points from T - 1 to 0, both included; (N + 1,) float32, ending in 0.

    DDIMScheduler's grid; `drop_last` gives DPMSolverMultistepScheduler's, made for N + 1 steps without the last one.

    Raises:
        InputError: as `get_sigmas_trailing`, or a single step, which would sit at t = 0.
    """
    total = schedule.num_train_timesteps
    _check_steps(num_inference_steps, total - drop_last)
    gaps = num_inference_steps - 1 + drop_last
    if gaps == 0:
        raise InputError("1 step with linspace spacing would start at t = 0; use trailing spacing or drop_last=True")
    stride = (total - 1) / gaps
    grid = [round((i + drop_last) * stride) for i in reversed(range(num_inference_steps))]
    return _sigmas_at(schedule, grid, strength)


def _sigmas_at(schedule: NoiseSchedule, timesteps: Sequence[int] | Tensor, strength: float = 1.0) -> Tensor:
    grid = torch.as_tensor(timesteps).cpu()
    total = schedule.num_train_timesteps
    given = ", ".join(str(t) for t in grid.flatten()[:8].tolist()) + (", ..." if grid.numel() > 8 else "")
    if grid.ndim != 1 or len(grid) == 0 or grid.is_floating_point():
        raise InputError(f"timesteps [{given}] must be a list of one or more whole numbers")
    if bool((grid.diff() >= 0).any()) or grid[0] >= total or grid[-1] < 0:
        raise InputError(f"timesteps [{given}] must fall strictly and lie in 0..{total - 1}")
    _check_strength(strength)
    kept = int(len(grid) * strength)
    if kept == 0:
        raise InputError(
            f"strength={strength} leaves none of {len(grid)} steps; "
            f"use strength of at least {1 / len(grid):g} or more steps"
        )
    sigmas = schedule.sigmas[grid[len(grid) - kept :]]
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def _check_steps(num_inference_steps: int, most: int | None = None) -> None:
    if num_inference_steps < 1:
        raise InputError(f"{num_inference_steps} steps is too few; use 1 or more")
    if most is not None and num_inference_steps > most:
        raise InputError(f"{num_inference_steps} steps are more than the schedule's {most}; use at most {most}")


def _check_strength(strength: float) -> None:
    if not 0 < strength <= 1:
        raise InputError(f"strength={strength} is outside (0, 1]; use 1 for a new image, less to keep more of the old")
