"""The one exception that stands for a mistake in the user's input, and the sign of memory that ran out."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The message is one line that names what was given and the remedy; command lines exit with code 2."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch raises an error of its own on accelerators, and a plain RuntimeError on a CPU."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in words or "not enough memory" in words
