"""The one exception that stands for a mistake in the user's input."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The message is one line that names what was given and the remedy; command lines exit with code 2."""
