"""A picture and its caption, whatever kind of data it comes from, and what all kinds share in reading it."""

from __future__ import annotations

import io
import json
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.errors import InputError
from lcm_core.files.reading import open_file
from lcm_core.pipeline.image import IMAGE_SUFFIXES, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = (*IMAGE_SUFFIXES, ".bmp", ".tif", ".tiff")
"""Suffixes of the files that are read as pictures."""
OTHER_PICTURES = (".heic", ".heif", ".gif", ".jxl", ".avif", ".svg", ".tar")
"""Suffixes of pictures that are not read beside others, which must not go unmentioned."""
CAPTIONS = (".txt", ".caption")
CAPTION_KEYS = ("text", "caption", "prompt")
"""Names of a caption in JSON and in tables, in the order in which they are tried."""
LONE_CAPTION = "a caption without a picture"

Skipped = list[tuple[str, str]]


@dataclass(frozen=True)
class Item:
    """One picture and its caption."""

    key: str
    """Its name for the user, unlike any other's: a path inside the folder, or `shard.tar/0001.jpg`."""
    caption: str
    """Empty where there is none."""
    open: Callable[[], Image]
    """Decodes the picture, turned as its EXIF orientation says; raises InputError where it cannot be read."""
    repeats: int = 1
    """How often it comes in an epoch."""
    file: Path | None = None
    """The file that it is in, where that is known."""


@dataclass(frozen=True)
class FoundData:
    """What was found in the data, in an order that depends on names alone."""

    items: list[Item]
    files: list[Path]
    """The files with the pictures; their bytes decide what is in the cache."""
    skipped: Skipped = field(default_factory=list)
    """(name, reason) of what cannot be used."""


def other_kind(name: str) -> str:
    """Why a file of `OTHER_PICTURES` is left out."""
    if name.lower().endswith(".tar"):
        return "a tar among pictures is not read; move it to a folder of its own"
    return f"{posixpath.splitext(name)[1]} files are not read; convert it to .png or .jpg"


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, one at a time."""
    try:
        with io.TextIOWrapper(open_file(path), encoding="utf-8-sig") as stream:
            yield from stream
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def clean(text: str) -> str:
    """A caption on one line: no runs of white space, no halves of characters that no tokenizer could read."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def read_text(path: Path) -> str:
    """The caption in a text file.

    Raises:
        InputError: missing, or not UTF-8.
    """
    return clean(" ".join(read_lines(path)))


def find_caption(record: dict[str, Any], name: str, column: str = "") -> str:
    """The caption in a JSON object or table row; empty where there is none.

    Args:
        record: the object.
        name: of it, for errors.
        column: whose value is the caption, a text or the number of a class; else one of `CAPTION_KEYS`.

    Raises:
        InputError: it is no text.
    """
    keys = (column,) if column else CAPTION_KEYS
    caption = next((record[key] for key in keys if record.get(key) is not None), "")
    if column and type(caption) is int:
        return str(caption)
    if not isinstance(caption, str):
        raise InputError(f"{name}: the caption is {type(caption).__name__}, not text; write it in quotes")
    return clean(caption)


def parse_object(text: str, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: it is no JSON, or no object.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not readable JSON ({error}); correct or remove it") from error
    if not isinstance(record, dict):
        raise InputError(f"{name} holds no JSON object; write {{...}} with one of {', '.join(CAPTION_KEYS)}")
    return record


def read_bytes(path: Path, key: str, start: int = 0, size: int = -1) -> bytes:
    """A plain file's bytes, or `size` of them from `start` on.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open_file(path) as stream:
            stream.seek(start)
            return stream.read(size)
    except OSError as error:
        raise InputError(f"cannot read {key}: {error.strerror}; check the file") from error


def decode(data: bytes, key: str) -> Image:
    """A picture from the bytes of its file.

    Raises:
        InputError: they are not a whole picture.
    """
    stream: Any = _Named(data)
    stream.key = key
    try:
        return open_image(stream)
    except InputError:
        raise
    except Exception as error:  # on broken files decoders raise whatever comes, and one file must not end a night's run
        raise InputError(f"cannot read {key} as a picture ({error}); save it again or remove it") from error


class _Named(io.BytesIO):
    """Bytes that errors call by their name."""

    key: str

    def __str__(self) -> str:
        return self.key

    __repr__ = __str__  # which some decoders' messages use; the default names an address in memory
