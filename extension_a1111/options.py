"""What the accordion, the API and the X/Y/Z plot set: checked in one place, written into the infotext."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcm_core.errors import InputError

LCM_SAMPLER = "LCM Suite"
TCD_SAMPLER = "TCD Suite"
AUTO_FIELD = "LCM Suite auto"
"""Name by which pasting finds `Options.auto`; no infotext has it."""
GAMMA_FIELD = "TCD gamma"
"""Name in the infotext of `Options.gamma`."""
ORIGINAL_STEPS_FIELD = "LCM original steps"
"""Name in the infotext of `Options.original_steps`."""
_KINDS: dict[str, Callable[[Any], Any]] = {"auto": bool, "gamma": float, "original_steps": int, "guidance": float}
_ARGS = ("auto", "gamma", "original_steps")


@dataclass(frozen=True)
class Options:
    """One picture's options, in the order of the accordion and of the API's `args`.

    Raises:
        InputError: a value out of its range.
    """

    auto: bool = False
    """Set sampler, steps and CFG by itself where an LCM is used."""
    gamma: float = 0.3
    """TCD's share of fresh randomness (arXiv 2402.19159), 0 to 1."""
    original_steps: int = 50
    """Timesteps that distillation used, 1 to 1000."""
    guidance: float | None = None
    """Guidance that must go in as w-embedding, by the X/Y/Z plot; None: the CFG slider, whatever the model."""

    def __post_init__(self) -> None:
        _check(GAMMA_FIELD, self.gamma, 0, 1)
        _check(ORIGINAL_STEPS_FIELD, self.original_steps, 1, 1000)
        if self.guidance is not None:
            _check("guidance", self.guidance, -1e6, 1e6)

    def infotext(self, sampler: str) -> dict[str, float]:
        """What a picture's infotext must say so that pasting it gives the picture again."""
        said: dict[str, float] = {}
        if sampler == TCD_SAMPLER:
            said[GAMMA_FIELD] = self.gamma
        said[ORIGINAL_STEPS_FIELD] = self.original_steps  # the default too: pasting must undo another value
        return said


def reset_unnamed(params: dict[str, Any]) -> None:
    """Add the defaults of what a pasted infotext, as `params`, does not name, or the page would keep another value.

    No infotext switches `auto` on: a picture names what it was made with, which `auto` might change.
    """
    params.setdefault(AUTO_FIELD, False)
    params.setdefault(GAMMA_FIELD, Options.gamma)
    params.setdefault(ORIGINAL_STEPS_FIELD, Options.original_steps)


def read_options(args: Sequence[Any], axes: Mapping[str, Any] | None = None) -> Options:
    """Options from the accordion's or the API's `args`, of which the last may be missing, and from the plot's axes.

    Raises:
        InputError: too many, or one that is no number or out of its range.
    """
    names = ", ".join(_ARGS)
    if len(args) > len(_ARGS):
        raise InputError(f"LCM Suite was given {len(args)} args; give at most {len(_ARGS)}: {names}")
    given = dict(zip(_ARGS, args, strict=False)) | dict(axes or {})
    try:
        read = {name: _KINDS[name](value) for name, value in given.items() if value is not None}
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"LCM Suite's args {list(args)} must be {names}: {error}") from error
    return Options(**read)


def _check(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:  # which is also false for NaN
        raise InputError(f"{name} {value} is out of range; use {lowest:g} to {highest:g}")
