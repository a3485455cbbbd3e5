"""Looks after one distillation: starts the trainer, passes on a wish to stop, and hands its LoRA over once written.

Runs as a program of its own, `python distil_runner.py FOLDER`, so that training outlives a reload or a crash of the web
UI. Standard library only; the same file is imported by the web UI for the lock.

While training goes on, the lock file is held by this program and by the trainer, which inherits it. Whoever cannot get
the lock knows that a run is alive, and that it is ours; a number from a file of process ids could be anybody's by now.

FOLDER/job.json is read: {"command", "cwd", "lock"}, and {"result", "lora"} where a LoRA comes of it. Written beside it
are pids.json when the command has started, lora.json when the LoRA was handed over, {"lora", "error"}, which is long
before the trainer has scored it, and exit.json at the end: {"code", "stopped", "lora", "error"}. `error` is why the
LoRA could not be copied or, with the code `NOT_STARTED`, the command not be started. A file `stop` is a wish to stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

BUSY = 3
"""Exit code: another run holds the lock."""
NOT_STARTED = -1
"""In the place of the exit code of a command that could not be started."""
RUNNER_LOCK = "runner.lock"
"""File in a job's folder; only the runner holds it, so that it says whether the runner is alive."""
_PATIENCE = 2.0  # seconds; somebody may be looking whether the lock is free


def take_lock(path: Path) -> IO[bytes] | None:
    """The open lock file, which holds the lock until it is closed everywhere; None when another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab")  # noqa: SIM115
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader never sees half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)


def main(folder: Path) -> int:
    """Run the job in `folder`. Returns its exit code."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    lock, alive = _wait_for_lock(Path(job["lock"])), take_lock(folder / RUNNER_LOCK)
    if lock is None or alive is None:
        return BUSY
    (folder / "stop").unlink(missing_ok=True)
    for old in ("exit.json", "lora.json"):
        (folder / old).unlink(missing_ok=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the web UI was started in the background; inherited
    inherited: Any = {} if os.name == "nt" else {"pass_fds": (lock.fileno(),)}
    try:
        child = subprocess.Popen(job["command"], cwd=job["cwd"], stdin=subprocess.DEVNULL, **inherited)
    except OSError as error:
        write(folder / "exit.json", {"code": NOT_STARTED, "stopped": False, "lora": None, "error": str(error)})
        return 1
    try:
        write(folder / "pids.json", {"runner": os.getpid(), "trainer": child.pid})
    except OSError:  # a full disk; nobody could stop that trainer later
        child.kill()
        raise
    files = (Path(job["result"]), Path(job["lora"])) if "result" in job else None
    code = _watch(child, folder, files)
    handed = _handed(folder)
    if code == 0 and files and not handed.get("lora"):  # a result of an earlier start, or a copy that failed
        handed = _hand_over(folder, *files)
    lora, mistake = handed.get("lora"), handed.get("error")
    stopped = (folder / "stop").exists()
    write(folder / "exit.json", {"code": code, "stopped": stopped, "lora": lora, "error": mistake})
    return 0


def interrupt(pid: int) -> None:
    """Ask a trainer to save and stop. Windows has no such signal: there it goes on from its last saved state."""
    os.kill(pid, signal.SIGTERM if os.name == "nt" else signal.SIGINT)


def _wait_for_lock(path: Path) -> IO[bytes] | None:
    deadline = time.monotonic() + _PATIENCE
    while (lock := take_lock(path)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return lock


def _watch(child: subprocess.Popen[bytes], folder: Path, files: tuple[Path, Path] | None) -> int:
    """Wait for the trainer; each new wish to stop is one more signal, for a second one makes it stop at once.

    The trainer puts a finished LoRA in place whole: a new one is handed over as soon as it is there.
    """
    heard, stop = 0, folder / "stop"
    before = _version(files)
    while True:
        code = child.poll()  # first: what was written before the end is seen below
        asked = stop.stat().st_size if stop.exists() else 0
        if code is None and asked > heard:
            heard = asked
            interrupt(child.pid)
        if files and (now := _version(files)) != before:
            before = now
            _hand_over(folder, *files)
        if code is not None:
            return code
        time.sleep(0.3)


def _version(files: tuple[Path, Path] | None) -> tuple[int, int] | None:
    """Changes when a new result was put in place."""
    if files is None:
        return None
    try:
        stat = files[0].stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino


def _hand_over(folder: Path, result: Path, target: Path) -> dict[str, Any]:
    """Copy the LoRA to where the web UI looks, and write down where it is, or what went wrong."""
    handed: dict[str, Any] = {"lora": None, "error": None}
    temporary = target.with_name(f".{target.name}.part")
    if result.is_file():
        try:
            shutil.copyfile(result, temporary)
            os.replace(temporary, target)
            handed["lora"] = str(target)
        except OSError as error:
            handed["error"] = f"{result} -> {target}: {error.strerror}"
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk; exit.json says it again
            write(folder / "lora.json", handed)
    return handed


def _handed(folder: Path) -> dict[str, Any]:
    """What was handed over before; nothing where nothing was."""
    try:
        return dict(json.loads((folder / "lora.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
