"""The files of the cache: what they are called, which are missing, and making those."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from lcm_core.errors import InputError
from lcm_core.files.safetensors import (
    CHECKSUM_KEY,
    check_checksum,
    check_file,
    read_safetensors,
    write_json,
    write_safetensors,
)
from trainer.data.hashing import hash_json
from trainer.distributed import Processes

Maker = Callable[[range], dict[str, Tensor]]
"""A function from the numbers of pictures (or captions) to the tensors of their shard."""
_STALE = 3600.0  # seconds after which a temporary file is nobody's: a shard is written in a moment


class Shards:
    """Numbered files that hold `total` things, `each` in one, in a folder named by the hash of what they come from.

    Args:
        stem: path and first part of the folder's name.
        identity: plain JSON values that the contents depend on.
    """

    def __init__(self, stem: Path, identity: Mapping[str, Any], total: int, each: int) -> None:
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
        for index in range(len(self)):
            if not self.has(index):
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
        return self.folder / f"{index:06d}.safetensors"

    def numbers(self, index: int) -> range:
        """Which things a shard is made from."""
        return range(index * self.each, min((index + 1) * self.each, self.total))

    def has(self, index: int) -> bool:
        """Whether a shard is there and has its length; its contents are not read."""
        try:
            check_file(self.path(index))
        except InputError:
            return False
        return True

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


def fill(shards: Shards, load: Callable[[], Maker], processes: Processes, what: str) -> None:
    """Make this process's share of the shards that are missing or damaged; the networks are loaded only if there is
    one. What a thing took is kept in `speed.json`, for estimates."""
    mine = range(processes.rank, len(shards), processes.size)
    checked = tqdm(
        mine, desc=f"checking cached {what}", unit="file", delay=2, leave=False, disable=not processes.is_main
    )
    missing = [index for index in checked if not shards.is_whole(index)]
    if not missing:
        return
    make, started = load(), time.monotonic()
    total = sum(len(shards.numbers(index)) for index in missing)
    with tqdm(total=total, desc=f"caching {what}", unit=what[:-1], disable=not processes.is_main) as bar:
        for index in missing:
            write_safetensors(shards.path(index), make(shards.numbers(index)))
            bar.update(len(shards.numbers(index)))
    if processes.is_main:
        write_json(shards.speed, {"seconds": (time.monotonic() - started) / (total * processes.size)})
