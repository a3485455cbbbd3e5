"""What the extension says, in the web UI's language.

The web UI translates a text on its page only where the whole of it is a key of `localizations/LANGUAGE.json`. Sentences
with names and numbers in them are therefore translated here, from the same files: their key is the sentence with
`{places}` for these.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError

FOLDER = Path(__file__).parents[1] / "localizations"
Say = Callable[..., str]
"""Takes a sentence with places, and what to put there by name; gives it in somebody's language."""


def english(sentence: str, **values: Any) -> str:
    """The sentence as it is, filled in."""
    return sentence.format(**values) if values else sentence


class Mistake(InputError):
    """A mistake of the user's as a sentence with places, which the page says in its language; `str` gives English."""

    def __init__(self, sentence: str, **values: Any) -> None:
        super().__init__(english(sentence, **values))
        self.sentence = sentence
        """What `Say` takes."""
        self.values = values
        """What is filled in: names, numbers, and what others have said, which stays as it is."""


def explain(error: ValueError, say: Say = english) -> str:
    """A mistake in somebody's language. What the library or the trainer complains of is quoted as it is."""
    if isinstance(error, Mistake):
        return say(error.sentence, **error.values)
    return say("This cannot be used: {words}", words=error)


def speaker(language: str | None) -> Say:
    """`Say` for a language by the name of its localization: "ko_KR", or another project's "zh-Hans (Stable)"."""
    table = _table((language or "")[:2].lower())

    def say(sentence: str, **values: Any) -> str:
        return english(table.get(sentence, sentence), **values)

    return say


@functools.lru_cache
def _table(language: str) -> dict[str, str]:
    file = next(iter(sorted(FOLDER.glob(f"{language}_*.json"))), None) if language else None
    return {} if file is None else dict(json.loads(file.read_text(encoding="utf-8")))
