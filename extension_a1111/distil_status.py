"""How a run is doing, read from the files of its folder."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from extension_a1111 import distil_runner
from extension_a1111.distil import JOB, Places, current, is_running
from extension_a1111.distil_jobs import NOT_STARTED, read_json
from extension_a1111.distil_python import SETUP, is_made

_TAIL = 512 * 1024  # bytes of a log that are read: the last thousands of steps
_POINTS = 400  # of the curve
_BAR = re.compile(r"(?P<label>[^\r\n|]*?):?\s*\d+%\|[^|]*\|\s*(?P<done>\d+)/(?P<total>\d+) \[(?P<rest>[^\]]*)\]")
_FETCHED = re.compile(r"(?:Downloading|Using cached|Collecting) (?:\S*/)?(\S+)")  # in what pip says
_REPORT = "report.html"
_SAMPLES = "samples"
_LAST_LINE = "The last line of its log: {words}"
_NOT_COPIED = "The LoRA is finished, but it could not be copied: {words}"
_STRIPS = 6  # of previews, side by side
SHOWN = {"teacher": 25, "student": 4}
"""The networks whose pictures are set side by side at the end, and of how many steps."""


@dataclass(frozen=True)
class Status:
    """One look at a run."""

    state: str
    """none, running, stopping, stopped, finished, failed or interrupted; or making, of the trainer's Python."""
    name: str = ""
    label: str = ""
    """What is being counted: the cache, the training, the final table."""
    done: int = 0
    total: int = 0
    details: str = ""
    """Speed, time left and loss, as the trainer's progress bar says them."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss), thinned out."""
    previews: list[Path] = field(default_factory=list)
    """Strips of pictures of a run that goes on, spread over its steps; the last is the newest."""
    pairs: list[tuple[Path, Path]] = field(default_factory=list)
    """Pictures of the end of the run: the same prompt by teacher and student, with as many steps as in `SHOWN`."""
    report: Path | None = None
    folder: str = ""
    """Where all files of the run are."""
    lora: str = ""
    message: str = ""
    """What went wrong, in the words of a program, which are English."""
    frame: str = _LAST_LINE
    """The page's sentence around it."""


def look(places: Places) -> Status:
    """The state of the trainer's Python while it is made, or when that failed; else that of the last run."""
    setup = places.root / SETUP
    if is_made(places.root):
        return _read("making", setup)
    if not places.python and read_json(setup / "exit.json").get("code", 0) != 0:
        return _read("failed", setup)
    name = current(places)
    if name is None:
        return Status("none")
    run = places.root / name
    job = run / JOB
    ended, handed = read_json(job / "exit.json"), read_json(job / "lora.json")
    found = _read(_state(places, job, ended), job)
    if error := ended.get("error") or handed.get("error"):
        is_started = ended.get("code") != distil_runner.NOT_STARTED
        found = replace(found, message=error, frame=_NOT_COPIED if is_started else NOT_STARTED)
    lora, report = ended.get("lora") or handed.get("lora") or "", run / _REPORT
    return replace(
        found,
        name=name,
        losses=read_losses(run / "run" / "log.jsonl"),
        previews=_spread(sorted((run / "previews").glob("*.png"))),
        pairs=_pairs(run / _SAMPLES),
        report=report if report.is_file() else None,
        folder=str(run),
        lora=lora if Path(lora).is_file() else "",
    )


def _read(state: str, job: Path) -> Status:
    """What the log of a job says: its progress bar, and its last words where it has failed."""
    log = _tail(job / "run.log")
    bars = list(_BAR.finditer(log))
    bar = bars[-1] if bars else None
    lines = [line.strip() for line in re.split(r"[\r\n]+", _BAR.sub("\n", log)) if line.strip()]
    fetched = _FETCHED.findall(log) if state == "making" else []
    return Status(
        state,
        label=bar["label"].strip() if bar else "",
        done=int(bar["done"]) if bar else 0,
        total=int(bar["total"]) if bar else 0,
        details=fetched[-1] if fetched else bar["rest"] if bar else "",
        message=lines[-1] if lines and state in ("failed", "interrupted") else "",
    )


def _pairs(samples: Path) -> list[tuple[Path, Path]]:
    """The trainer's pictures `samples/ROLE-STEPS-NUMBER.png` of those that are shown, where both are there."""
    columns = [sorted(samples.glob(f"{role}-{steps:02d}-*.png")) for role, steps in SHOWN.items()]
    return [(teacher, student) for teacher, student in zip(*columns, strict=False)]


def _spread(files: list[Path]) -> list[Path]:
    """The first, the last, and some between them."""
    last = len(files) - 1
    return [files[i] for i in sorted({last * k // (_STRIPS - 1) for k in range(_STRIPS)})] if files else []


def _state(places: Places, job: Path, ended: dict[str, Any]) -> str:
    if is_running(places):
        return "stopping" if (job / "stop").exists() else "running"
    if not ended:
        return "interrupted"
    if ended["code"] == 0 and (ended["lora"] or not ended["stopped"]):
        return "finished"
    return "stopped" if ended["stopped"] else "failed"


def read_losses(path: Path) -> list[tuple[int, float]]:
    """The last steps' (step, loss) from the trainer's log, each of at most `_POINTS` the mean of its stretch."""
    rows = []
    for line in _tail(path).splitlines():
        try:
            row = json.loads(line)
            rows.append((int(row["step"]), float(row["loss"])))
        except (ValueError, KeyError, TypeError):  # cut off at either end
            continue
    width = -(-len(rows) // _POINTS) or 1
    stretches = [rows[i : i + width] for i in range(0, len(rows), width)]
    return [(stretch[-1][0], sum(loss for _, loss in stretch) / len(stretch)) for stretch in stretches]


def _tail(path: Path) -> str:
    """The end of a text file; nothing where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - _TAIL, 0))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
