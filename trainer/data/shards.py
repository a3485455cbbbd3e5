"""The files of the cache: what they are called, which are missing, and making those."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.safetensors import (
    CHECKSUM_KEY,
    check_checksum,
    read_json,
    read_safetensors,
    write_json,
)
from trainer.data.hashing import hash_json

Maker = Callable[[Sequence[int]], dict[str, Tensor]]
"""A function from the numbers of pictures (or captions) to the tensors of their shard."""
FORMAT = 3
"""Part of every hash; to be raised when the contents of shards change their meaning."""
_CHECKED, _SUFFIX = "checked.json", ".safetensors"
_STALE = 3600.0  # seconds after which a temporary file is nobody's: a shard is written in a moment


@dataclass(frozen=True)
class Contents:
    """What the rows of shards are of, so that a later cache can take those that it needs, too."""

    made_by: Mapping[str, Any]
    """All that a row depends on but its own picture or caption, as plain JSON values."""
    keys: Callable[[], Sequence[str]]
    """A text for each picture or caption, by number, which decides the rest of its row."""


class Shards:
    """Numbered files that hold `total` things, `each` in one, in a folder named by the hash of what they come from.

    Args:
        stem: path and first part of the folder's name.
        identity: plain JSON values that the contents depend on.
        total, each: how many things.
        contents: what the rows are of, where that is known.

    Attributes:
        starts: where each thing is a shard of its own, whose rows it numbers from 0 on, the number of the first row in
            each, once that is known; None where rows have the numbers of the things.
    """

    def __init__(
        self, stem: Path, identity: Mapping[str, Any], total: int, each: int, contents: Contents | None = None
    ) -> None:
        self.contents = contents
        self.starts: Sequence[int] | None = None
        self.identity = {**identity, "each": each}
        self.folder = stem.with_name(f"{stem.name}-{hash_json(self.identity)}")
        self.total, self.each = total, each

    def __len__(self) -> int:
        return -(-self.total // self.each)

    def check(self) -> None:
        """Refuse a cache that the other processes did not fill.

        Raises:
            InputError: a shard is missing.
        """
        found = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        for index in range(len(self)):
            if self.path(index).name not in found:
                raise InputError(
                    f"{self.path(index)} is missing though another process made it; give all machines one cache folder"
                )

    def begin(self) -> None:
        """Say in the folder what it is made from, and clear away what killed processes have left.

        Raises:
            InputError: the folder cannot be written, before hours of work go into it.
        """
        about = self.folder / "about.json"
        if not about.is_file():
            write_json(about, self.identity)
        for file in self.folder.glob(".*"):
            if time.time() - file.stat().st_mtime > _STALE:
                file.unlink(missing_ok=True)

    @property
    def speed(self) -> Path:
        """File with the `seconds` that one thing took, where some were made."""
        return self.folder / "speed.json"

    def path(self, index: int) -> Path:
        """Where a shard is."""
        return self.folder / f"{index:06d}{_SUFFIX}"

    def numbers(self, index: int) -> range:
        """Which things a shard is made from."""
        return range(index * self.each, min((index + 1) * self.each, self.total))

    def is_whole(self, index: int) -> bool:
        """Whether a shard is there and is, bit by bit, what was written; the whole file is read.

        Warns of one that is there and damaged, or that states no checksum.
        """
        path = self.path(index)
        if not path.exists():
            return False
        try:
            tensors, metadata = read_safetensors(path)
            if CHECKSUM_KEY not in metadata:
                raise InputError(f"{path} was written by an earlier version and states no checksum")
            check_checksum(path, tensors, metadata)
        except InputError as error:
            what, _, _ = str(error).partition(
                ";"
            )  # what comes behind it, to get the file again, is not the user's part
            warnings.warn(f"{what}; it is made again", stacklevel=2)
            return False
        return True


def known_whole(folder: Path) -> dict[str, Any]:
    """Name of each file in a folder that was read and found whole -> its size and time of change then."""
    try:
        return read_json(folder / _CHECKED)
    except InputError:  # it only saves time
        return {}


def remember_whole(folder: Path) -> None:
    """Write down that the files in a folder, as they are now, are whole."""
    files = {entry.name: _stamp(entry.stat()) for entry in os.scandir(folder) if entry.name.endswith(_SUFFIX)}
    if files != known_whole(folder):
        write_json(folder / _CHECKED, dict(sorted(files.items())))


def is_unchanged(file: Path, known: Mapping[str, Any]) -> bool:
    """Whether a file is as it was when it was last found whole."""
    return file.name in known and file.exists() and known[file.name] == _stamp(file.stat())


def _stamp(state: os.stat_result) -> list[int]:
    return [state.st_size, state.st_mtime_ns]
