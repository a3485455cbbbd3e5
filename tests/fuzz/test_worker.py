"""The worker ends when it is told to, whatever else goes on: a run of the tests that waits for it would never end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import lcm_core
from tests.fuzz import guards
from tests.fuzz.guards import Case, Worker


@pytest.fixture
def cold(tmp_path: Path) -> Worker:
    """A worker that has imported nothing yet."""
    return Worker(tmp_path, Path(lcm_core.__file__).parents[1])


def test_process_that_holds_its_stdin_open(cold: Worker) -> None:
    """As one does that was forked, and not replaced by another program, while the worker ran."""
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    start = time.monotonic()
    try:
        cold.close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert time.monotonic() - start < guards.END_SECONDS + 5
    assert cold._process.returncode == 0


def test_worker_that_does_not_listen(cold: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "ANSWER_SECONDS", 0.1)
    os.kill(cold._process.pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match="ended with -9 and without an answer"):
        cold.faults(Case(("info",)))
    assert cold._process.returncode == -signal.SIGKILL
    cold.close()
