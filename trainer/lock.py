"""Keeping two runs out of one folder: they would overwrite each other's states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lcm_core.errors import InputError

LOCK = "run.lock"
"""File in the run's folder that a run holds locked; it says nothing by being there."""


@contextmanager
def lock_folder(folder: Path, holds: bool = True) -> Iterator[None]:
    """Hold a run's folder for this process; the system lets it go when the process ends, in whatever way.

    Args:
        folder: of the run; made where it is missing.
        holds: false for the further processes of one run, which do not lock.

    Raises:
        InputError: another run has it, or it cannot be written.
    """
    if not holds:
        yield
        return
    from filelock import FileLock, Timeout  # comes with torch

    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{folder} is in use by another run; wait for it or stop it, or choose another --output"
        ) from None
    except NotImplementedError:
        pass  # a file system that cannot lock, such as some network drives
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another --output") from error
    try:
        yield
    finally:
        lock.release()
