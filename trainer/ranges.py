"""Refusing numbers and names that a setting cannot have, in one wording. Loads no other library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lcm_core.errors import InputError


def check_ranges(config: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse a number outside of its range, ends included, NaN and infinity.

    Args:
        config: holds the settings.
        ranges: name -> (lowest, highest).

    Raises:
        InputError: names the first setting that is wrong, its value and its range.
    """
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise InputError(f"{name} {value} is out of range; use {low} to {high}")


def check_choices(config: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Refuse a name that is none of those allowed.

    Raises:
        InputError: names the first setting that is wrong, its value and what it may be.
    """
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            raise InputError(f"unknown {name} {value!r}; choose {', '.join(allowed)}")
