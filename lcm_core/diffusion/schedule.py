"""Training noise schedules of variance-preserving diffusion, as tables of the cumulative signal fraction abar."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lcm_core.errors import InputError


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
