"""Around a host's denoiser, `model(x, sigma, **extra_args) -> x0`: consistency, and no idle negative pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import boundary_scalings, per_sample
from lcm_core.diffusion.guidance import Model
from lcm_core.diffusion.process import VariancePreserving


def consistency(model: Model, process: VariancePreserving) -> Model:
    """The consistency function f (arXiv 2310.04378 Eq. 9) of a denoiser that gives x0.

    Guidance may have happened inside: f is linear in x0, so that guiding x0 and guiding f are the same.
    """

    def denoise(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        x0 = model(x, sigma, **extra_args)
        a, _ = process.network_scales(per_sample(sigma, x))
        c_skip, c_out = boundary_scalings(per_sample(process.sigma_to_t(sigma), x))
        return (c_skip * (x * a) + c_out * x0).to(x0.dtype)

    return denoise


class PositiveRows:
    """Keeps a host from computing a negative pass that is multiplied by 0.

    At guidance 1 the host still asks for positive and negative rows, in one batch or in several, positive ones first,
    and mixes `negative + 1 * (positive - negative)`. Here the network computes the positive rows only, and negative
    ones are answered with them, so that the mix is the positive one.
    """

    def __init__(self) -> None:
        self._missing: int | None = None  # positive rows still to come; None: compute all
        self._answers: list[Tensor] = []

    def begin(self, positive_rows: int | None) -> None:
        """Start a step with this many positive rows, or with None where the negative ones matter."""
        self._missing = positive_rows
        self._answers = []

    def wrap(self, forward: Model) -> Model:
        """A network's `forward(x, sigma, cond=...)` that computes the positive rows only."""

        def positive_only(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
            if self._missing is None:
                return forward(x, sigma, **extra_args)
            count = min(self._missing, len(x))
            if count:
                self._answers.append(forward(x[:count], sigma[:count], **first_rows(extra_args, count)))
                self._missing -= count
            answers = torch.cat(self._answers)
            return torch.cat([answers[len(answers) - count :], answers[: len(x) - count]])

        return positive_only


def first_rows(cond: Any, count: int) -> Any:
    """The first `count` rows of every tensor in nested dicts and lists; anything else as it is."""
    if isinstance(cond, Tensor):
        return cond[:count]
    if isinstance(cond, Mapping):
        return {key: first_rows(value, count) for key, value in cond.items()}
    if isinstance(cond, list):
        return [first_rows(value, count) for value in cond]
    return cond
