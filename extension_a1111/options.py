"""What the accordion, the API and the X/Y/Z plot set: checked in one place, written into the infotext."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from extension_a1111.translation import Mistake
from lcm_core.errors import InputError

LCM_SAMPLER = "LCM Suite"
TCD_SAMPLER = "TCD Suite"
SAMPLERS = (LCM_SAMPLER, TCD_SAMPLER)
AUTO_FIELD = "LCM Suite auto"
"""Name by which pasting finds `Options.auto`; no infotext has it."""
GAMMA_FIELD = "TCD gamma"
"""Name in the infotext of `Options.gamma`."""
ORIGINAL_STEPS_FIELD = "LCM original steps"
"""Name in the infotext of `Options.original_steps`."""
_HOST_DEFAULTS = {
    "ENSD": 0,
    "NGMS": 0.0,
    "NGMS all steps": False,
    "SGM noise multiplier": False,
    "Skip Early CFG": 0.0,
    "Noise multiplier": 1.0,
    "Extra noise": 0.0,
    "Noise Schedule": "Default",
    "Pad conds": False,
    "Pad conds v0": False,
    "Token merging ratio": 0.0,
    "Token merging ratio hr": 0.0,
    "Downcast alphas_cumprod": False,
    "Tiling": False,
}
"""Settings of the hosts that change our pictures, by their names in an infotext, which leaves out these defaults."""
_CLIP_SKIP = re.compile(r"\bClip skip: (\d+)(?:,|$)", re.MULTILINE)
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


def reset_unnamed(infotext: str, params: dict[str, Any], skipped: Sequence[str] = ()) -> None:
    """Add the defaults of what a pasted infotext does not name, or the page would keep another value.

    No infotext switches `auto` on: a picture names what it was made with, which `auto` might change. Of the host's own
    settings those are added that change pictures of our samplers; other pictures are the host's business.

    Args:
        infotext: as it was pasted.
        params: what the host has read in it; changed in place.
        skipped: names that the user does not want to be pasted.
    """
    params.setdefault(AUTO_FIELD, False)
    params.setdefault(GAMMA_FIELD, Options.gamma)
    params.setdefault(ORIGINAL_STEPS_FIELD, Options.original_steps)
    if params.get("Sampler") not in SAMPLERS:
        return
    clip_skip = _CLIP_SKIP.findall(infotext)
    named = {"Clip skip": clip_skip[-1]} if clip_skip else {}  # Neo leaves it out of `params`
    for name, value in {**_HOST_DEFAULTS, **named}.items():
        if name not in skipped:
            params.setdefault(name, value)


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
        words = "{name} {value} is out of range; use {lowest} to {highest}"
        raise Mistake(words, name=name, value=value, lowest=f"{lowest:g}", highest=f"{highest:g}")
