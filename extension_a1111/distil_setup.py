"""Makes the trainer's Python: a virtual environment with the web UI's own version of torch, and what the trainer needs.

Runs as a program of its own, `python distil_setup.py FOLDER WORDS...`, with pip's words for torch. Standard library
only; the same file is imported by the web UI. It prints its progress as the trainer prints its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
_LEAST = (2, 4)  # of torch, for the trainer; see pyproject.toml


def python_in(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def torch_words(version: str, index: str) -> list[str]:
    """pip's words for torch as the web UI has it, or for the newest where that is too old for the trainer.

    Args:
        version: of the web UI's torch, e.g. "2.9.0" or "2.9.0+cu128", where the part behind + names a build.
        index: where the web UI's own installer takes such builds from; the last part of its path names one.
    """
    number, _, build = version.partition("+")
    source = ["--extra-index-url", f"{index.rstrip('/').rpartition('/')[0]}/{build}"] if build and index else []
    if tuple(map(int, re.findall(r"\d+", number)[:2])) < _LEAST:
        return [f"torch>={'.'.join(map(str, _LEAST))}", *source]
    return [f"torch=={version if source else number}", *source]


def main(folder: Path, torch: list[str]) -> int:
    """Make the environment, or finish one that was begun. Returns pip's exit code."""
    python = str(python_in(folder))
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
    steps = [
        ("venv", [sys.executable, "-m", "venv", str(folder)]),
        ("torch", [*pip, *torch]),
        ("trainer", [*pip, "-c", str(_pinned(folder, torch)), f"{REPOSITORY}[train]"]),
    ]
    for done, (name, words) in enumerate(steps):
        print(f"{name}: {100 * done // len(steps)}%|#| {done}/{len(steps)} [{name}]", flush=True)
        if code := subprocess.run(words, stdin=subprocess.DEVNULL, check=False).returncode:
            return code
    return 0


def _pinned(folder: Path, torch: list[str]) -> Path:
    """A file that keeps pip from changing torch again for the trainer's sake."""
    file = folder.with_name("constraints.txt")
    file.write_text(f"{torch[0]}\n", encoding="utf-8")
    return file


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
