"""A first guess at how long training takes, before any step was measured: its operations at this device's speed."""

from __future__ import annotations

import time
from functools import cache

import torch

EFFICIENCY = 0.4
"""Share of the speed of one large matrix product that whole networks reach; small ones less, so that this is rough."""
_RUNS = 3


@cache
def operations_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """What one large matrix product reaches on a device, measured; a fraction of a second."""
    side = 512 if device.type == "cpu" else 4096
    with torch.no_grad():
        a = torch.randn(side, side, device=device, dtype=dtype)
        seconds = min(_time(a) for _ in range(_RUNS))
    return 2 * side**3 / seconds


def rough_seconds(operations: int, device: torch.device, dtype: torch.dtype) -> float:
    """How long so many operations of a network take."""
    return operations / (EFFICIENCY * operations_per_second(device, dtype))


def _time(a: torch.Tensor) -> float:
    started = time.perf_counter()
    float((a @ a)[0, 0])  # waits for the device
    return max(time.perf_counter() - started, 1e-9)
