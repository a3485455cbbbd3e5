"""Prompts of the preview pictures, with switches as other trainers write them: `a cat --n blurry --d 42 --w 512`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from lcm_core.errors import InputError
from lcm_core.pipeline.options import PictureOptions

_SWITCHES: dict[str, tuple[str, Callable[[str], int | float | str]]] = {
    "n": ("negative_prompt", str),
    "d": ("seed", int),
    "w": ("width", int),
    "h": ("height", int),
    "l": ("guidance_scale", float),
}
_SWITCH = re.compile(r"(?:^|\s)--(\w+)\s")


def read_prompts(lines: Sequence[str]) -> list[PictureOptions]:
    """What each line asks for; a picture's seed is its number in the list where the line gives none.

    Raises:
        InputError: an unknown switch, or a value that is no number.
    """
    return [PictureOptions(seed=number) | _read(line) for number, line in enumerate(lines)]


def _read(line: str) -> PictureOptions:
    prompt, *parts = _SWITCH.split(line + " ")
    values: dict[str, int | float | str] = {}
    for switch, text in zip(parts[::2], parts[1::2], strict=True):
        if switch not in _SWITCHES:
            known = ", ".join(f"--{name} ({meaning})" for name, (meaning, _) in _SWITCHES.items())
            raise InputError(f"preview prompt {line!r} has the unknown switch --{switch}; use {known}")
        name, kind = _SWITCHES[switch]
        try:
            values[name] = kind(text.strip())
            if not math.isfinite(float(text) if kind is float else 0):
                raise ValueError
        except ValueError:
            raise InputError(f"preview prompt {line!r}: --{switch} {text.strip()} is no number; correct it") from None
    return PictureOptions(prompt=prompt.strip(), **values)  # type: ignore[arg-type]
