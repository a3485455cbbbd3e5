"""Distances between two predictions, the d(.,.) of consistency losses."""

from __future__ import annotations

import math

from torch import Tensor

from lcm_core.errors import InputError
from trainer.methods.config import DISTANCES


def adaptive_c(original_steps: int) -> float:
    """The c that suits a grid of N timesteps, exp(-1.18 log(N - 1) - 0.72) (arXiv 2502.01441): the finer the
    grid, the closer its neighbours, and the smaller the differences that still count."""
    return math.exp(-1.18 * math.log(max(original_steps - 1, 1)) - 0.72)


def distance(a: Tensor, b: Tensor, kind: str = "huber", huber_c: float = 0.001) -> Tensor:
    """Distance of each sample, (B, ...) -> (B,), averaged over its elements.

    l2: (a - b)^2. huber: sqrt((a - b)^2 + c^2) - c, the pseudo-Huber distance (arXiv 2310.14189 Sec. 3.3, by element).
    cauchy: log(1 + (a - b)^2 / (2 c^2)) (arXiv 2502.01441 Eq. 9).

    Raises:
        InputError: unknown kind.
    """
    squared = (a - b).square()
    if kind == "l2":
        values = squared
    elif kind == "huber":
        values = (squared + huber_c**2).sqrt() - huber_c
    elif kind == "cauchy":
        values = (squared / (2 * huber_c**2)).log1p()
    else:
        raise InputError(f"unknown loss {kind!r}; choose {', '.join(DISTANCES)}")
    return values.flatten(1).mean(1)
