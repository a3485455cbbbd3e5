"""How a distilled model wants to be sampled, as its file states it: the trainer writes it, and all hosts follow it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lcm_core.errors import InputError
from lcm_core.settings import FEW_STEP_SAMPLERS

KIND_KEY = "lcm_suite.kind"
"""Safetensors metadata: which sampler a distilled model or LoRA was made for, lcm or tcd."""
STEPS_KEY = "lcm_suite.steps"
"""Alike: how many steps it is best at."""
GAMMA_KEY = "lcm_suite.gamma"
"""Alike: for tcd, the share of fresh noise in each step."""


@dataclass(frozen=True)
class Stated:
    """How a distilled model wants to be sampled; what is None is not said."""

    sampler: str
    """One of `FEW_STEP_SAMPLERS`."""
    steps: int | None = None
    gamma: float | None = None

    def __str__(self) -> str:
        steps = "" if self.steps is None else f", {self.steps} steps"
        gamma = "" if self.gamma is None else f", gamma {self.gamma:g}"
        return f"{self.sampler}{steps}{gamma}"

    def metadata(self) -> dict[str, str]:
        """What to write into a file."""
        said = {KIND_KEY: self.sampler, STEPS_KEY: self.steps, GAMMA_KEY: self.gamma}
        return {key: str(value) for key, value in said.items() if value is not None}


def read_stated(metadata: Mapping[str, str], name: str) -> Stated | None:
    """What a file's metadata state; None where they say nothing.

    Args:
        metadata: of a safetensors file.
        name: the file's, for the message.

    Raises:
        InputError: steps or gamma are no numbers, or out of range.
    """
    sampler = metadata.get(KIND_KEY)
    if sampler not in FEW_STEP_SAMPLERS:
        return None
    try:
        steps = int(metadata[STEPS_KEY]) if STEPS_KEY in metadata else None
        gamma = float(metadata[GAMMA_KEY]) if GAMMA_KEY in metadata else None
    except ValueError as error:
        raise InputError(f"{name}: {STEPS_KEY} and {GAMMA_KEY} must be numbers: {error}") from error
    if (steps is not None and steps < 1) or not 0 <= (gamma or 0.0) <= 1:
        raise InputError(f"{name} states {steps} steps and gamma {gamma}; they must be 1 or more, and 0 to 1")
    return Stated(sampler, steps, gamma)
