"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


_PARTIAL = ".partial-"
_RANDOM = 8  # characters that tempfile adds
_LONGEST_NAME = 255  # bytes; what the usual file systems allow


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    The temporary name keeps the suffix, because writers such as Pillow choose the format by it. What a writer that was
    killed has left in the folder is removed.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    target = Path(path)
    check_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        temporary, handle = _temporary_file(target)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}; choose another output path") from error
    try:
        yield temporary
        _fsync(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
        _fsync_folder(target.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; free some space or choose another output path"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
        _close(handle)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is flushed to disk and renamed to `path`, else removed.

    Raises:
        InputError: `path` exists already, the folder cannot be written, or the disk is full.
    """
    target = Path(path)
    check_name(target)
    if target.exists():
        raise InputError(f"{target} exists already; choose another output path or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent)
        temporary, handle = _temporary_folder(target)
        temporary.chmod(0o777 & ~_umask())
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _fsync_folder(file) if file.is_dir() else _fsync(file)
            os.replace(temporary, target)
            _fsync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            _close(handle)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; free some space or choose another output path"
        ) from error


def check_name(path: Path) -> None:
    """Refuse a name that no file system takes: too long, or with a null byte.

    Raises:
        InputError: names the file.
    """
    if "\0" in str(path):
        raise InputError(f"cannot write {str(path)!r}: a file name has no null byte; choose another output path")
    try:
        longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    except UnicodeEncodeError:
        raise InputError(f"cannot write {str(path)!r}: its name is no valid text; choose another output path") from None
    if longest > _LONGEST_NAME:
        raise InputError(f"cannot write {path}: its name has more than {_LONGEST_NAME} bytes; choose a shorter one")
    try:
        special = path.exists() and not path.is_file() and not path.is_dir()
    except OSError as error:  # the whole path is too long, or leads through a folder that may not be entered
        raise InputError(f"cannot write {path}: {error.strerror}; choose another output path") from error
    if special:
        raise InputError(f"cannot write {path}: it is a device or a pipe; choose another output path")


# --- temporary files: who writes one holds a lock on it, which the system takes away when the writer dies -------------


def _temporary_file(target: Path) -> tuple[Path, int | None]:
    while True:
        handle, name = tempfile.mkstemp(prefix=_prefix(target), suffix=target.suffix, dir=target.parent)
        if fcntl is None:  # Windows, where an open file can be neither renamed nor opened by another writer
            os.close(handle)
            return Path(name), None
        if _lock(handle, Path(name)):
            return Path(name), handle


def _temporary_folder(target: Path) -> tuple[Path, int | None]:
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        if fcntl is None:
            return temporary, None
        with suppress(FileNotFoundError):  # another process has taken it for a leftover before it was locked
            handle = os.open(temporary, os.O_RDONLY)
            if _lock(handle, temporary):
                return temporary, handle


def _prefix(target: Path) -> str:
    """A hidden name that says what it belongs to, as far as there is room."""
    room = _LONGEST_NAME - len(os.fsencode(target.suffix)) - len(_PARTIAL) - _RANDOM - 1
    stem = os.fsencode(target.stem)[: max(room, 0)].decode("utf-8", "ignore")
    return f".{stem}{_PARTIAL}"


def _lock(handle: int, path: Path) -> bool:
    """Lock a temporary file; False when `_remove_leftovers` of another process was quicker, and it is gone."""
    with suppress(OSError):  # a file system without locks: then nobody removes leftovers there
        fcntl.flock(handle, fcntl.LOCK_EX)
    if path.exists():
        return True
    os.close(handle)
    return False


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of writers that are dead: those that nobody holds a lock on."""
    if fcntl is None:
        return
    pattern = re.compile(rf"\..*{re.escape(_PARTIAL)}[a-z0-9_]{{{_RANDOM}}}(\.[^.]*)?", re.DOTALL)
    with os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name) and not entry.is_symlink()]
    for path in found:
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _fsync_folder(path: Path) -> None:
    """Flush a folder's list of names. Some file systems refuse that; the files themselves are safe by then."""
    with suppress(OSError):
        _fsync(path)


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
