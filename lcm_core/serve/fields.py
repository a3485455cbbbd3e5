"""The door for what clients send: JSON values, each taken with its kind and its limits, and pictures in base64."""

from __future__ import annotations

import base64
import io
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcm_core.errors import InputError
from lcm_core.files.reading import check_text

if TYPE_CHECKING:
    from PIL.Image import Image


class RequestError(InputError):
    """A request that is refused. The message is one line; `status` is the HTTP status that goes with it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What one client may ask for."""

    side: int = 1024
    """Pixels along each side of a picture."""
    steps: int = 50
    """Calls of the network for one picture."""
    pictures: int = 8
    """Pictures in one request."""
    frames: int = 48
    """Frames of a loop."""
    waiting: int = 32
    """Requests that have not been painted yet; further ones are refused."""
    live: int = 32
    """Pages that are open at once."""
    body: int = 16 * 2**20
    """Bytes of one request."""
    body_seconds: float = 30.0
    """Seconds in which a request must have been sent."""
    prompt: int = 4000
    """Characters of a prompt."""
    input_pixels: int = 4096 * 4096
    """Pixels of an input picture."""


class Fields:
    """A JSON object from a client. A field that is missing or null has its default; any other is checked."""

    def __init__(self, values: Mapping[str, Any], limits: Limits) -> None:
        self.limits = limits
        self._values = values
        self._read: set[str] = set()

    def get(self, name: str) -> Any:
        """The value as it came, or None."""
        self._read.add(name)
        return self._values.get(name)

    def unread(self, kept: Sequence[str] = ()) -> list[str]:
        """Names of fields that ask for something and that nobody has read, apart from `kept`."""
        asked = (name for name, value in self._values.items() if value and name not in self._read)
        return sorted(str(name) for name in asked if name not in kept)

    def mark_unread(self, name: str) -> None:
        """Let `unread` name a field whose value could not be used."""
        self._read.discard(name)

    def text(self, name: str, default: str = "", one_of: Sequence[str] = ()) -> str:
        """A text within the limit of prompts.

        Raises:
            RequestError: another kind of value, too long, unstorable, or none of `one_of` where that is given.
        """
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise RequestError(f"{name} is {_short(value)}; give a text")
        if len(value) > self.limits.prompt:
            raise RequestError(f"{name} has {len(value)} characters; use up to {self.limits.prompt}")
        check_text(name, value)
        if one_of and value not in one_of:
            raise RequestError(f"{name} {_short(value)} is unknown; use {' or '.join(one_of)}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float | None:
        """A finite number in [low, high].

        Raises:
            RequestError: another kind of value, or out of range.
        """
        value = self.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:  # NaN compares as False
            raise RequestError(f"{name} is {_short(value)}; give a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number in [low, high]; 20.0 is one too.

        Raises:
            RequestError: another kind of value, or out of range.
        """
        value = self.get(name)
        if value is None:
            return default
        is_whole = type(value) is int or (type(value) is float and math.isfinite(value) and value.is_integer())
        if not is_whole or not low <= value <= high:
            raise RequestError(f"{name} is {_short(value)}; give a whole number from {low} to {high}")
        return int(value)

    def flag(self, name: str) -> bool:
        """True or false; false where it is missing.

        Raises:
            RequestError: another kind of value.
        """
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise RequestError(f"{name} is {_short(value)}; give true or false")
        return value

    def picture(self, name: str) -> Image | None:
        """A picture in base64, with or without `data:image/png;base64,` before it.

        Raises:
            RequestError: as `decode_picture`.
        """
        value = self.get(name)
        return None if value is None or value == "" else decode_picture(name, value, self.limits)

    def inner(self, name: str) -> Fields:
        """An object within the object; empty when it is missing.

        Raises:
            RequestError: another kind of value.
        """
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise RequestError(f"{name} is {_short(value)}; give an object")
        return Fields(value or {}, self.limits)


def decode_picture(name: str, value: Any, limits: Limits) -> Image:
    """A picture from base64.

    Raises:
        RequestError: no text, no base64, no picture, or one with too many pixels.
    """
    from lcm_core.pipeline.image import open_image

    if not isinstance(value, str):
        raise RequestError(f"{name} is {_short(value)}; give a picture in base64")
    data = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return open_image(io.BytesIO(base64.b64decode(data, validate=True)), limits.input_pixels)
    except (InputError, ValueError) as error:
        most = f"{limits.input_pixels:,}"
        raise RequestError(f"{name} is no readable picture; give a PNG, JPEG or WebP of up to {most} pixels") from error


def describe(error: Exception) -> str:
    """An error in one line for the client. A fault of ours is no more than named; the terminal gets the whole of it."""
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    traceback.print_exception(error)
    return "the server failed; its terminal says why"


def _short(value: object) -> str:
    """A value for a message of one line."""
    text = " ".join(repr(value).split()) if not isinstance(value, (dict, list)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
