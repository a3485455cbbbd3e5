"""What a folder says of all pictures in it: `folder.json`, or its name as sd-scripts reads it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcm_core.errors import InputError
from lcm_core.files.reading import read_json
from trainer.data.items import find_caption

FOLDER_FILE = "folder.json"
_NAME = re.compile(r"(\d+)_(.*)")
_MOST_REPEATS = 1000


@dataclass(frozen=True)
class FolderSettings:
    """The settings of one folder, and of those in it that say nothing themselves."""

    repeats: int = 1
    """How often each picture comes."""
    caption: str = ""
    """The caption of pictures without one of their own."""


def read_folders(root: Path, names: Sequence[str], by_name: bool) -> dict[str, FolderSettings]:
    """Folders, relative to the root, that say something.

    Args:
        root: of the data.
        names: all files in it.
        by_name: whether names like `10_a cat` count.

    Raises:
        InputError: a folder.json with other or wrong settings.
    """
    folders = {posixpath.dirname(name) for name in names}
    found = {folder: _of_name(folder) for folder in folders if by_name and _NAME.fullmatch(posixpath.basename(folder))}
    for name in names:
        if posixpath.basename(name) == FOLDER_FILE:
            found[posixpath.dirname(name)] = _read(root / name)
    return found


def settings_of(name: str, folders: Mapping[str, FolderSettings]) -> FolderSettings:
    """What the nearest folder above a picture says that says something."""
    folder = posixpath.dirname(name)
    while folder and folder not in folders:
        folder = posixpath.dirname(folder)
    return folders.get(folder, FolderSettings())


def _of_name(folder: str) -> FolderSettings:
    number, caption = _NAME.fullmatch(posixpath.basename(folder)).groups()  # type: ignore[union-attr]
    return FolderSettings(_repeats(int(number), folder), caption.strip())


def _read(path: Path) -> FolderSettings:
    stated = read_json(path)
    if odd := stated.keys() - {"repeats", "caption"}:
        raise InputError(f"{path} has the unknown setting '{min(odd)}'; it may have repeats and caption")
    return FolderSettings(_repeats(stated.get("repeats", 1), str(path)), find_caption(stated, str(path)))


def _repeats(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST_REPEATS:
        raise InputError(f"{where}: repeats {value!r} is out of range; use 1 to {_MOST_REPEATS}")
    return value
