"""Pictures inside webdataset tars: `0001.jpg` with its caption in `0001.txt` or `0001.json`.

A tar is read once from end to end for the places of its members; a picture is then fetched by its place, so any order
of reading is quick and nothing is unpacked.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lcm_core.errors import InputError
from trainer.data.items import (
    CAPTIONS,
    LONE_CAPTION,
    OTHER_PICTURES,
    PICTURES,
    FoundData,
    Item,
    Skipped,
    clean,
    decode,
    find_caption,
    other_kind,
    parse_object,
    read_bytes,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_LONGEST_TEXT = 1_000_000  # bytes
DAMAGES = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError)
"""What comes out of tarfile on damaged headers."""


class Span(NamedTuple):
    """Where a member's bytes are."""

    name: str
    start: int
    size: int


def find_tars(path: Path) -> list[Path]:
    """The tars that a path stands for: itself, or those in a folder without pictures of its own; else none.

    Raises:
        InputError: they are compressed.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    tars = [file for file in files if file.suffix == ".tar"]
    if any(file.name.lower().endswith(PICTURES) for file in files):
        return []
    packed = next((file for file in files if file.name.endswith(_COMPRESSED)), None)
    if packed is not None and not tars:
        raise InputError(f"{packed} is compressed, so its pictures cannot be fetched one by one; unpack it to a .tar")
    return tars


def read_tars(paths: list[Path], column: str = "") -> FoundData:
    """List the pictures in tars, in their order. Of a damaged tar, those before the damage are used.

    Args:
        paths: of the tars.
        column: of the samples' JSON, or the suffix of their members without the dot (`cls`), that has the captions.
    """
    items: list[Item] = []
    skipped: Skipped = []
    for path in paths:
        for stem, members in _groups(path, skipped).items():
            _add(path, stem, members, items, skipped, column)
    return FoundData(items, paths, skipped)


def _groups(path: Path, skipped: Skipped) -> dict[str, dict[str, Span]]:
    """Members by name up to the first dot, then by suffix."""
    groups: dict[str, dict[str, Span]] = {}
    try:
        for span in _spans(path):
            stem, suffix = split_name(span.name)
            if stem:
                groups.setdefault(stem, {})[suffix] = span
    except DAMAGES as error:
        skipped.append((path.name, damage(len(groups), error)))
    return groups


def split_name(name: str) -> tuple[str, str]:
    """A member's name up to the first dot behind its folder, which its sample's members share, empty where it is
    hidden; and the rest in lower case."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return folder + slash + stem if stem else "", dot + suffix.lower()


def damage(samples: int, error: Exception) -> str:
    """Why what follows in a tar is left out."""
    return f"the tar is damaged after {samples} samples ({error}); get it again"


def _spans(path: Path) -> Iterator[Span]:
    end = path.stat().st_size
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if not member.isreg() or member.issparse():
                continue
            if not 0 <= member.offset_data <= member.offset_data + member.size <= end:
                raise tarfile.ReadError("unexpected end of data")
            yield Span(member.name, member.offset_data, member.size)


def _add(path: Path, stem: str, members: dict[str, Span], items: list[Item], skipped: Skipped, column: str) -> None:
    """Turn one group into an item, or say why not."""
    picture = next((members[suffix] for suffix in PICTURES if suffix in members), None)
    text = next((members[suffix] for suffix in text_suffixes(column) if suffix in members), None)
    if picture is None:
        other = next((members[suffix] for suffix in OTHER_PICTURES if suffix in members), None)
        if other is not None:
            skipped.append((f"{path.name}/{other.name}", other_kind(other.name)))
        elif text is not None:
            skipped.append((f"{path.name}/{stem}", LONE_CAPTION))
        return
    key = f"{path.name}/{picture.name}"
    try:
        caption = "" if text is None else _caption(path, text, column)
    except InputError as error:
        skipped.append((key, str(error)))
        return
    items.append(Item(key, caption, partial(_open_member, path, picture, key), file=path))


def text_suffixes(column: str) -> tuple[str, ...]:
    """Suffixes of the members that may have a sample's caption, those that go first in front; `column` as of
    `read_tars`."""
    return (f".{column}", ".json") if column else (*CAPTIONS, ".json")


def _caption(path: Path, span: Span, column: str) -> str:
    name = f"{path.name}/{span.name}"
    check_length(span.size, name)
    return parse_caption(read_bytes(path, name, span.start, span.size), name, column)


def check_length(size: int, name: str) -> None:
    """Refuse a caption of a length that none has.

    Raises:
        InputError: names it.
    """
    if size > _LONGEST_TEXT:
        raise InputError(f"{name} is too long for a caption ({size:,} bytes); shorten it")


def parse_caption(data: bytes, name: str, column: str) -> str:
    """The caption in a member of this name; `column` as of `read_tars`.

    Raises:
        InputError: it is not what it should be.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    is_json = name.lower().endswith(".json")
    return find_caption(parse_object(text, name), name, column) if is_json else clean(text)


def _open_member(path: Path, span: Span, key: str) -> Image:
    return decode(read_bytes(path, key, span.start, span.size), key)
