"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lcm_core.errors import InputError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    The temporary name keeps the suffix, because writers such as Pillow choose the format by it.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}; choose another output path") from error
    temporary = Path(name)
    try:
        yield temporary
        _fsync(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        _fsync(target.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; free some space or choose another output path"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    Raises:
        InputError: `path` exists already, the folder cannot be written, or the disk is full.
    """
    target = Path(path)
    if target.exists():
        raise InputError(f"{target} exists already; choose another output path or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        temporary.chmod(0o777 & ~_umask())
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _fsync(file)
            os.replace(temporary, target)
            _fsync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; free some space or choose another output path"
        ) from error


def _fsync(path: Path) -> None:
    if os.name == "nt":  # there neither folders nor read-only handles can be flushed
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    # mkstemp makes files private; the user's own umask must decide instead, and it can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
