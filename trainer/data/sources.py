"""Reading data as a list of pictures with captions: which kind it is, and the two plain kinds, folder and prompts."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lcm_core.errors import InputError
from trainer.data.folders import read_folders, settings_of
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
    read_lines,
    read_text,
)
from trainer.data.saved import is_saved, read_saved
from trainer.data.tars import find_tars, read_tars

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FoundData", "Item", "read_prompts", "read_source"]

METADATA = "metadata.jsonl"


def read_source(path: Path, column: str = "", folder_names: bool = False) -> FoundData:
    """List the pictures of a folder, of webdataset tars, or of a folder saved by `datasets`; nothing is decoded yet.

    Args:
        path: of the data.
        column: of its tables, or JSON, that has the captions, where it is none of the usual.
        folder_names: see `read_folders`.

    Raises:
        InputError: nothing there, nothing in it that can be used, or a broken table of captions.
    """
    if not path.exists():
        raise InputError(f"data {path} does not exist; give a folder of images, a .tar, or a saved datasets folder")
    try:
        source = _read_any(path, column, folder_names)
    except OSError as error:
        raise InputError(f"cannot read data {path}: {error.strerror}; check its permissions") from error
    if not source.items:
        raise InputError(f"data {path} {_emptiness(source.skipped)}; give images ({', '.join(PICTURES)})")
    return source


def _read_any(path: Path, column: str, folder_names: bool) -> FoundData:
    if path.is_dir() and is_saved(path):
        return read_saved(path, column)
    if tars := find_tars(path):
        return read_tars(tars, column)
    if path.is_dir():
        return read_folder(path, column, folder_names)
    raise InputError(f"data {path} is a single file; give its folder, or a prompts file as prompts instead of data")


def _emptiness(skipped: Skipped) -> str:
    if not skipped:
        return "holds no images"
    if all(reason == LONE_CAPTION for _, reason in skipped):
        return f"holds {len(skipped)} captions but no images"
    name, reason = skipped[0]
    return f"holds no image that can be used (first: {name}: {reason})"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one on each line that is not blank.

    Raises:
        InputError: missing, not UTF-8, or without prompts.
    """
    prompts = [prompt for line in read_lines(path) if (prompt := clean(line))]
    if not prompts:
        raise InputError(f"{path} holds no prompts; write one on each line")
    return prompts


def read_folder(root: Path, column: str = "", folder_names: bool = False) -> FoundData:
    """The images in a folder and its subfolders, sorted by path; hidden files are left out.

    `metadata.jsonl` speaks for the images that it names, a text file beside the image for the others, and for what is
    left the folder.

    Raises:
        InputError: a line of metadata.jsonl, or a folder.json, is not what it should be.
    """
    skipped: Skipped = []
    names = sorted(_walk(root, skipped))
    pictures = [name for name in names if name.lower().endswith(PICTURES)]
    skipped += [(name, other_kind(name)) for name in names if name.lower().endswith(OTHER_PICTURES)]
    texts = {name for name in names if name.endswith(CAPTIONS)}
    stated = _read_metadata(root / METADATA, column) if METADATA in names else {}
    folders = read_folders(root, names, folder_names)
    items, used = [], set()
    for name in pictures:
        beside = next((text for end in CAPTIONS if (text := posixpath.splitext(name)[0] + end) in texts), None)
        used.add(beside)
        try:
            said = settings_of(name, folders)
            own = stated.pop(name) if name in stated else read_text(root / beside) if beside and not column else ""
            caption = own or ("" if column else said.caption)
            items.append(Item(name, caption, partial(_open_file, root / name, name), said.repeats, root / name))
        except InputError as error:
            skipped.append((name, str(error)))
    skipped += [(name, LONE_CAPTION) for name in sorted([*stated, *(texts - used)])]
    return FoundData(items, [root / name for name in pictures], skipped)


def _open_file(path: Path, key: str) -> Image:
    return decode(read_bytes(path, key), key)


def _walk(root: Path, skipped: Skipped) -> Iterator[str]:
    """Paths of all files that are not hidden, relative to `root`, with forward slashes."""

    def report(error: OSError) -> None:
        skipped.append((os.path.relpath(error.filename, root), f"the folder cannot be listed: {error.strerror}"))

    for folder, folders, files in os.walk(root, onerror=report):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        for name in files:
            if not name.startswith("."):
                yield Path(folder, name).relative_to(root).as_posix()


def _read_metadata(path: Path, column: str) -> dict[str, str]:
    """Path of an image -> its caption."""
    captions: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        record = parse_object(line, where)
        name = record.get("file_name")
        if not isinstance(name, str) or not name:
            raise InputError(f'{where} names no image; write {{"file_name": "cat.jpg", "text": "a cat"}}')
        name = posixpath.normpath(name)
        if name in captions:
            raise InputError(f"{where} names {name} again; give each image one line")
        captions[name] = find_caption(record, where, column)
    return captions
