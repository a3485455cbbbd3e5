"""Jobs that outlive the web UI: started in a folder of their own, and looked after by `distil_runner`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from extension_a1111 import distil_runner
from extension_a1111.translation import Mistake

NOT_STARTED = "The trainer did not start: {words}"
REPOSITORY = Path(__file__).parents[1]
START_SECONDS = 60.0


def launch(job: Path, python: str) -> None:
    """Start the runner of the job that is written in a folder, and wait until it has the lock.

    Raises:
        InputError: another job holds the lock, or the runner ends at once.
    """
    (job / "pids.json").unlink(missing_ok=True)
    own_group: dict[str, Any] = {"creationflags": 0x200} if os.name == "nt" else {"start_new_session": True}
    with open(job / "run.log", "wb") as log:  # of this start alone: an old progress bar would be shown
        runner = subprocess.Popen(
            [python, str(Path(distil_runner.__file__)), str(job)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=trainer_environment(),
            **own_group,
        )
    deadline = time.monotonic() + START_SECONDS
    while not (job / "pids.json").exists() and time.monotonic() < deadline:
        if (code := runner.poll()) is not None:
            if code == distil_runner.BUSY:
                raise Mistake("A distillation is running already; stop it first, or wait.")
            raise Mistake(NOT_STARTED, words=_last_line(job / "run.log"))
        time.sleep(0.05)


def trainer_environment() -> dict[str, str]:
    """The environment variables of the trainer: it is not installed, but found beside this package."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Around what writes into a run's folder: a full disk is said in one line."""
    try:
        yield
    except OSError as error:
        raise not_written(folder, error) from error


def check_writable(folder: Path) -> None:
    """Raise InputError where a folder cannot be made, or nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # a full disk still makes empty files
    except OSError as error:
        raise not_written(folder, error) from error


def not_written(folder: Path, error: OSError) -> Mistake:
    """What to say where a folder of the runs, or of the LoRAs, takes no files."""
    words = "The folder {folder} cannot be written ({reason}); free some space, or choose another."
    return Mistake(words, folder=folder, reason=error.strerror)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or none yet."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def is_locked(path: Path) -> bool:
    """Whether a living process holds a lock file."""
    if not path.exists():
        return False
    lock = distil_runner.take_lock(path)
    if lock is None:
        return True
    lock.close()
    return False


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
