"""What no input may cause, and how each of these bars is measured."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 2 << 30
"""Bytes of peak memory, everything imported included."""
LINE = 1100
"""Letters of an error: more is no line that anybody reads."""
ANSWER_SECONDS = 300.0
"""How long an answer may take, a crowded machine included; the worker itself ends a command that hangs long before."""
END_SECONDS = 10.0
"""How long the worker may take to end."""
FIFO = "fifo"
"""Stands for a pipe's content in `Case.files`: whoever opens it waits for ever."""
Content = bytes | Path | str


@dataclass(frozen=True)
class Case:
    """One command line and the files that it reads."""

    argv: tuple[str, ...]
    """INPUTS/ stands for the folder of `files`. The working folder is the only one that may be written."""
    files: Mapping[str, Content] = field(default_factory=dict, repr=False)
    """Path below INPUTS -> its bytes, what it is a link to, or FIFO."""
    about: str = ""
    """What is odd about the files."""
    program: str = "lcm_core.cli.main"
    encoding: str = "utf-8"
    """The encoding of the terminal."""


class Worker:
    """The client of `worker.py`, with a workspace that is made anew for each case."""

    def __init__(self, root: Path, code: Path) -> None:
        self.inputs, self.output, self.temporary = root / "inputs", root / "output", root / "temporary"
        self.home, self.streams = root / "home", root / "streams"
        self.root = root
        plain = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        places = {"PYTHONPATH": str(code), "HOME": str(self.home), "TMPDIR": str(self.temporary)}
        self._make_folders()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            env={**os.environ, **plain, **places},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # so that a command in a fork is ended with it
        )

    def close(self) -> None:
        """End the process. It is told to: a process that was forked here may hold its stdin open for longer."""
        try:
            self._send({"end": True})
            self._process.wait(END_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            self._kill()

    def warm(self, program: str, argv: Sequence[str]) -> None:
        """Let the process import what a good command line needs."""
        self._make_folders()
        self._ask({"warm": True, "program": program, "argv": list(argv), "folder": str(self.output)})

    def faults(self, case: Case) -> list[str]:
        """Run a case. Returns every bar that it broke."""
        self._make_folders()
        for name, content in case.files.items():
            _put(self.inputs / name, content)
        argv = [text.replace("INPUTS", str(self.inputs)) for text in case.argv]
        before = _listing(self.root)
        answer = self._ask(
            {
                "program": case.program,
                "argv": argv,
                "folder": str(self.output),
                "writable": [str(self.output), str(self.temporary)],
                "encoding": case.encoding,
                "stdout": str(self.streams / "stdout"),
                "stderr": str(self.streams / "stderr"),
            }
        )
        said = (self.streams / "stderr").read_text(encoding="utf-8", errors="replace")
        must_be_empty = (
            answer["code"] != 0 and case.program == "lcm_core.cli.main"
        )  # the trainer goes on from its files
        return [*_ending(answer, said), *_left_behind(before, self.root, must_be_empty)]

    def _make_folders(self) -> None:
        for folder in (self.inputs, self.output, self.temporary, self.home, self.streams):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Raises RuntimeError where the worker has ended, or does not answer and is killed."""
        assert self._process.stdout is not None
        killer = threading.Timer(ANSWER_SECONDS, self._kill)
        killer.start()
        try:
            self._send(order)
            line = self._process.stdout.readline()
        finally:
            killer.cancel()
        if not line:
            ended = self._process.wait(END_SECONDS)
            raise RuntimeError(f"the worker ended with {ended} and without an answer to {order!r:.2000}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _send(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(END_SECONDS)


def _put(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Path):
        path.symlink_to(content)
    else:
        os.mkfifo(path)


def _ending(answer: Mapping[str, Any], said: str) -> Iterator[str]:
    """Faults of how the command ended: 0, or 2 and one line."""
    yield from answer["seen"]
    if answer["hung"]:
        yield "hung"
    elif answer["signal"]:
        yield f"ended by signal {answer['signal']}: {said[-300:]}"
    elif answer["error"] and not answer["seen"]:
        yield f"traceback: {answer['error']}"
    elif answer["code"] not in (0, 2) and not answer["seen"]:
        yield f"exit code {answer['code']}"
    if answer["peak"] > MEMORY:
        yield f"took {answer['peak'] / 1e9:.1f} GB"
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if answer["code"] == 2 and (len(lines) != 1 or not said.rstrip().endswith(lines[0].rstrip())):
        yield f"no line of its own for the error: {said[-300:]}"
    if any(len(line) > LINE for line in lines):
        yield f"an error of {len(lines[0])} letters: {lines[0][:200]}"
    if answer["code"] == 2 and "out of memory" in said:
        yield "ran out of memory"


def _left_behind(before: dict[str, Any], root: Path, must_be_empty: bool) -> Iterator[str]:
    """Faults of the files: anything changed beside the output, left in a temporary folder, or half-written."""
    after = _listing(root)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    for name in changed:
        folder, _, rest = name.partition("/")
        if folder == "streams":
            continue
        if folder != "output":
            yield f"changed {name}"
        elif must_be_empty:
            yield f"failed, but left {name}"
        elif os.path.basename(rest).startswith(".") and (root / name).is_file():
            yield f"left a temporary file {name}"
        elif (root / name).is_file() and (reason := _damage(root / name)):
            yield f"wrote {name}, which is damaged: {reason}"


def _listing(root: Path) -> dict[str, Any]:
    """Every path below `root` with what changes when it is written."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            state = os.lstat(path)
            is_folder = name in folders and not os.path.islink(path)
            found[os.path.relpath(path, root)] = (
                None if is_folder else (state.st_size, state.st_mtime_ns, state.st_mode)
            )
    return found


def _damage(file: Path) -> str:
    """Why a file that was written is not whole; empty where it is."""
    from PIL import Image
    from safetensors import safe_open

    try:
        if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif"):
            with Image.open(file) as image:
                image.load()
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except Exception as error:
        return str(error) or type(error).__name__
    return ""
