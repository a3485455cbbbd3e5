"""Hashes of files, networks and settings: what a cache was made from, so that nothing else is ever taken for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
from lcm_core.files.reading import open_file

_BLOCK = 1 << 20  # bytes read at once
_LENGTH = 32  # hexadecimal digits that are kept: 128 bits


class FileHashes:
    """Hashes of files by content. Each is read once: later, the same size and time of change stand for its bytes.

    Args:
        path: JSON file that remembers the hashes; not written where nothing was new.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def digest(self, files: Sequence[Path]) -> str:
        """One hash of the contents of all files, in their order."""
        return hash_json(self.each(files))

    def each(self, files: Sequence[Path]) -> list[str]:
        """A hash of each file's contents.

        A file that cannot be read counts as such: its pictures are skipped when their turn comes.
        """
        known = _read_known(self.path)
        before = len(known)
        shown = tqdm(files, desc="reading the data once", unit="file", delay=2)
        result = [_remember(known, file) for file in shown]
        if len(known) != before:
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(known, indent=0, sort_keys=True), encoding="utf-8")
        return result


def hash_json(content: Any) -> str:
    """A hash of plain JSON values; the order of names in objects does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_LENGTH]


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and values of a network's weights, read straight from the mapped file."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return total.hexdigest()[:_LENGTH]


def hash_folder(folder: Path) -> str:
    """A hash of the names and contents of a folder's own files."""
    return hash_json([[file.name, _hash_file(file)] for file in sorted(folder.iterdir()) if file.is_file()])


def _remember(known: dict[str, str], file: Path) -> str:
    try:
        state = file.stat()
        # the size and the time are part of the name, so a changed file is a new entry
        name = f"{file.resolve()}?{state.st_size}?{state.st_mtime_ns}"
        if name not in known:
            known[name] = _hash_file(file)
        return known[name]
    except InputError as error:
        return f"unreadable: {error}"
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _hash_file(file: Path) -> str:
    total = hashlib.sha256()
    with open_file(file) as stream:
        for block in _blocks(stream):
            total.update(block)
    return total.hexdigest()[:_LENGTH]


def _blocks(stream: Any) -> Iterable[bytes]:
    return iter(lambda: stream.read(_BLOCK), b"")


def _read_known(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # the second is told when it is to be written
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable ({error}); delete it, and the data is read once more") from error
    return known if isinstance(known, dict) else {}
