"""A process that runs command lines, each in a fork of its own, and reports what each did that it must not.

It speaks JSON: one order a line on stdin, one answer a line on stdout. A fork starts in milliseconds with everything
imported, leaves nothing behind for the next command, may be killed, and has a peak of memory of its own.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

SECONDS = 20.0
"""What hangs for longer is killed: waiting for something, or at work for as long."""
_SPARE = (
    4 << 30
)  # bytes that a command may ask for beyond what is mapped already; the bar is lower, the machine is safe
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.truncate": None, "os.chmod": 2, "os.utime": 3}
"""Events about one path, and where their arguments hold a folder's handle that the path is relative to."""
_PAIRS = ("os.rename", "os.link", "os.symlink")
_PROCESSES = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec", "os.spawn")
_NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo")
_PICKLES = ("pickle.find_class",)


class Forbidden(BaseException):
    """Stops the command at the first thing that it must not do; no `except Exception` swallows it."""


class Guard:
    """An audit hook: files are written in these folders only, nothing is started, connected to or unpickled."""

    def __init__(self, folders: list[str]) -> None:
        self.folders = [os.path.realpath(folder) + os.sep for folder in folders]
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if args[2] & _WRITING:
                self._check(event, args[0])
        elif event in _CHANGES:
            place = _CHANGES[event]
            if place is None or args[place] == -1:  # else relative to a folder that was opened before
                self._check(event, args[0])
        elif event in _PAIRS:
            self._check(event, args[1])
        elif event in _PROCESSES or event in _NETWORK or event in _PICKLES:
            self._refuse(f"{event} {args[:2]!r:.200}")

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, int) or os.fspath(path) in (os.devnull, os.fsencode(os.devnull)):
            return
        real = os.path.realpath(os.fsdecode(path)) + os.sep
        if not real.startswith(tuple(self.folders)):
            self._refuse(f"{event} wrote outside of the output folder: {real}")

    def _refuse(self, what: str) -> NoReturn:
        self.seen.append(what)
        raise Forbidden(what)


def main() -> None:
    """Answer orders until there is one with "end", or stdin ends. An order with "warm" runs in this very process, for
    the sake of its imports."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # a fork would not have its thread, but might inherit its lock
    sys.dont_write_bytecode = True
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("end"):
            break
        answer = _warm(order) if order.get("warm") else _fork(order)
        gc.freeze()  # else each fork's collection writes to, and so copies, all memory that it shares
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # waits for no thread that a library has started


def _warm(order: dict[str, Any]) -> dict[str, Any]:
    os.chdir(order["folder"])
    with open(os.devnull, "w") as null:
        keep = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = null
        try:
            return {"code": importlib.import_module(order["program"]).main(order["argv"])}
        finally:
            sys.stdout, sys.stderr = keep


def _fork(order: dict[str, Any]) -> dict[str, Any]:
    """Run one command line in a fork, and wait for it, but not for ever."""
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(order, writing)
    os.close(writing)
    hung = not select.select([reading], [], [], SECONDS)[0]
    while hung and _lacks_turns(child):
        hung = not select.select([reading], [], [], 1.0)[0]
    if hung:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as stream:
        report = stream.read()
    _, status, usage = os.wait4(child, 0)
    return {
        **(json.loads(report) if report else {"code": None, "seen": [], "error": ""}),
        "hung": hung,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        "seconds": time.monotonic() - start,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * 1024,
    }


def _lacks_turns(child: int) -> bool:
    """Whether a process would go on if others did not take the processor: it waits for nothing, and has not had its
    seconds yet."""
    state, *numbers = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    seconds = sum(map(int, numbers[10:12])) / os.sysconf("SC_CLK_TCK")
    return state == "R" and seconds < SECONDS


def _run(order: dict[str, Any], report: int) -> NoReturn:
    """In the fork: run the command under guard, report, and end without the worker's own clearing up."""
    os.chdir(order["folder"])
    for number, name in ((0, os.devnull), (1, order["stdout"]), (2, order["stderr"])):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout.reconfigure(encoding=order["encoding"], errors="strict")  # type: ignore[union-attr]
    sys.stderr.reconfigure(encoding=order["encoding"], errors="backslashreplace")  # type: ignore[union-attr]
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _SPARE, mapped + _SPARE))
    guard = Guard(order["writable"])
    sys.addaudithook(guard)
    code, error = None, ""
    try:
        code = importlib.import_module(order["program"]).main(order["argv"])
    except SystemExit as exit:
        code = exit.code
    except BaseException as caught:
        error = _root(caught)
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except UnicodeError as caught:
        error = error or _root(caught)
    os.write(report, json.dumps({"code": code, "seen": guard.seen, "error": error}).encode())
    os._exit(0)


def _root(error: BaseException) -> str:
    """What was raised, and the last lines of ours that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    rooms = [f for f in frames if f"{os.sep}lcm_core{os.sep}" in f.filename or f"{os.sep}trainer{os.sep}" in f.filename]
    places = [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}" for frame in rooms[-2:]]
    return f"{type(error).__name__} at {' > '.join(places)}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    main()
