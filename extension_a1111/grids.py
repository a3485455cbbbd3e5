"""The grid of noise levels in the form in which web UIs ask for it."""

from __future__ import annotations

import torch
from torch import Tensor

from lcm_core.diffusion.schedule import NoiseSchedule, get_sigmas_lcm


def get_sigmas_padded(
    schedule: NoiseSchedule, num_inference_steps: int, host_steps: int, original_steps: int = 50, strength: float = 1.0
) -> Tensor:
    """`get_sigmas_lcm` for N steps at `strength`, with its first value repeated in front, (host_steps + 1,).

    A web UI makes image to image out of a longer grid: for N steps at strength s it asks for N / s and uses the last N.
    What is cut off may be anything; what is left is all N steps at exactly the noise level that was asked for.

    Raises:
        InputError: see `get_sigmas_lcm`.
    """
    sigmas = get_sigmas_lcm(schedule, num_inference_steps, original_steps, strength)
    return torch.cat([sigmas[:1].expand(max(host_steps - num_inference_steps, 0)), sigmas])
