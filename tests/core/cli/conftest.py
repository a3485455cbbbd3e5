"""A folder for each test of the command line, and a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lcm_core

CPU = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture
def emoji(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny model's path; the test runs in a folder of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return str(models / "emoji")


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def shell(*argv: str, **options) -> subprocess.Popen[str]:
    root = str(Path(lcm_core.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *argv], env=environment, **pipes, **options)
