"""The trainer's Python: which it is, whether it can do its work, and how one is made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from extension_a1111 import distil_runner, distil_setup
from extension_a1111.distil_jobs import REPOSITORY, START_SECONDS, check_writable, is_locked, launch, read_json, written
from extension_a1111.translation import Mistake

NEEDED = ("torch", "diffusers", "transformers", "safetensors", "numpy", "PIL", "tqdm")
SETUP = ".python"
"""Folder inside that of all runs: the environment, and the job that makes it."""
_PROBE = "import importlib.util as u, sys; print(*[m for m in sys.argv[1:] if u.find_spec(m) is None])"


def made_python(root: Path) -> str:
    """The Python that `make_python` has made; empty where there is none, or none whole."""
    ended = read_json(root / SETUP / "exit.json")
    return str(distil_setup.python_in(root / SETUP / "venv")) if ended.get("code") == 0 else ""


def is_made(root: Path) -> bool:
    """Whether a Python is being made now."""
    return is_locked(_lock(root))


def make_python(root: Path, torch_version: str, torch_index: str) -> None:
    """Start making the trainer's Python below `root`, or go on with it.

    Args:
        root: folder of all runs.
        torch_version, torch_index: see `distil_setup.torch_words`.

    Raises:
        InputError: it is being made already, or the folder cannot be written.
    """
    if is_made(root):
        raise Mistake("The trainer's Python is being made already; wait until it is ready.")
    check_writable(root)
    job = root / SETUP
    words = [sys.executable, str(Path(distil_setup.__file__)), str(job / "venv")]
    words += distil_setup.torch_words(torch_version, torch_index)
    with written(job):
        job.mkdir(exist_ok=True)
        distil_runner.write(job / "job.json", {"command": words, "cwd": str(root), "lock": str(_lock(root))})
        launch(job, sys.executable)


def check_python(python: str) -> None:
    """Refuse an interpreter that cannot run the trainer, and say how to make one that can.

    Raises:
        InputError: there is no such program, or packages are missing.
    """
    pip = Path("distil-venv", "Scripts" if os.name == "nt" else "bin", "pip")
    commands = f'python -m venv distil-venv; {pip} install "{REPOSITORY}[train]"'
    if not python:
        raise Mistake(
            "There is no Python for the trainer. Press the button below that makes one; or make one yourself "
            "({commands}) and name it in Settings > LCM Suite.",
            commands=commands,
        )
    try:
        words = [python, "-c", _PROBE, *NEEDED]
        probe = subprocess.run(words, capture_output=True, text=True, timeout=START_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise Mistake(
            "The trainer's Python {python} does not start ({reason}). Press the button below that makes one; or make "
            "one yourself ({commands}) and name it in Settings > LCM Suite.",
            python=python,
            reason=_reason(error),
            commands=commands,
        ) from error
    if missing := probe.stdout.split():
        names = " ".join(missing).replace("PIL", "pillow")
        raise Mistake(
            "The trainer's Python lacks {missing}; install what is missing: {python} -m pip install {names}",
            missing=", ".join(missing),
            python=python,
            names=names,
        )


def _lock(root: Path) -> Path:
    return root / SETUP / "running.lock"


def _reason(error: Exception) -> str:
    said: Sequence[str] = str(getattr(error, "stderr", None) or error).strip().splitlines()
    return said[-1] if said else type(error).__name__
