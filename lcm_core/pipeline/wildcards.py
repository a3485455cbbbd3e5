"""Words left to chance: `__colour__` in a prompt is a line of colour.txt, chosen by the picture's seed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

from lcm_core.errors import InputError
from lcm_core.files.reading import is_plain_name, read_text

_WILDCARD = re.compile(r"__([^\W_](?:[\w/-]*?[^\W_])?)__")
_LONGEST = 100_000  # characters; lines with several wildcards multiply
_DEEPEST = 10  # wildcards within a wildcard's lines


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without empty ones and those that begin with #.

    Raises:
        InputError: it cannot be read, or has none.
    """
    lines = [line.strip() for line in read_text(path).splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise InputError(f"{path} has no lines; write one text on each")
    return found


def fill_wildcards(prompt: str, folder: Path, seed: int) -> str:
    """A prompt with every `__name__` replaced by a line of `folder`/name.txt.

    The same seed chooses the same lines, whatever else is painted; lines may have wildcards of their own.

    Raises:
        InputError: there is no such file, or wildcards lead back to themselves.
    """
    chance = random.Random(f"wildcards {seed}")

    def line_of(match: re.Match[str]) -> str:
        name = match[1]
        if not all(is_plain_name(part) for part in name.split("/")):
            raise InputError(f"wildcard __{name[:40]}__ is no name of a file in {folder}")
        file = folder / f"{name}.txt"
        if not file.is_file():
            known = ", ".join(f"__{path.stem}__" for path in sorted(folder.glob("*.txt"))[:10]) or "none"
            raise InputError(f"wildcard __{name[:40]}__ has no file {file} (known: {known})")
        return chance.choice(read_lines(file))

    return _fill(prompt, line_of)


def _fill(prompt: str, line_of: Callable[[re.Match[str]], str]) -> str:
    for _ in range(_DEEPEST):
        if _WILDCARD.search(prompt) is None:
            return prompt
        prompt = _WILDCARD.sub(line_of, prompt)
        if len(prompt) > _LONGEST:
            break
    raise InputError(f"wildcards of {prompt[:40]!r} lead back to themselves; take one of them out of its file")
