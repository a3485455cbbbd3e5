"""One HTML page about a run: pictures before and after, scores, the loss, the cost, every setting.

The page holds its pictures and charts itself, runs no script and asks no other machine for anything, so it can be
mailed, archived and opened from a disk. It is made from the run's folder alone and can be made again at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_json
from lcm_core.pipeline.image import write_bytes
from trainer.report import sections as parts
from trainer.report.preview import Sample, read_samples
from trainer.report.template import fill

REPORT = "report.html"


@dataclass(frozen=True)
class Run:
    """What a run's folder says; every part may be missing."""

    name: str
    config: Mapping[str, Any]
    log: Sequence[Mapping[str, float]]
    """One entry for each step: step, loss, learning_rate, seconds that it took, peak_memory in bytes so far."""
    rows: Sequence[Mapping[str, Any]]
    """Scores, by the names in `trainer.report.tables.COLUMNS`; the teacher's have the model "teacher"."""
    remark: str
    """What the scores were measured on."""
    samples: Sequence[Sample]
    previews: Sequence[tuple[str, Path]]
    skipped: Sequence[Sequence[str]]
    """Name and reason of each picture that could not be read."""
    machine: Mapping[str, Any]


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` from what a run left in its folder. Returns the page's path.

    Read are, where they exist: `config.json`; `run/log.jsonl`; `run/machine.json` (`trainer.machine.describe_machine`);
    `results.json` with `rows` and a `remark`; `samples/` (`preview.save_samples`); `previews/step-*.png`;
    `skipped.json`, a list of [name, reason].

    Raises:
        InputError: the folder or a file in it cannot be read, or the page cannot be written.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root} is no folder of a run; give the --output of `distill`")
    write_bytes(root / REPORT, render(read_run(root)).encode())
    return root / REPORT


def read_run(root: Path) -> Run:
    """All that a run's folder says.

    Raises:
        InputError: a file in it is damaged.
    """
    results = _object(root / "results.json")
    return Run(
        name=root.resolve().name,
        config=_object(root / "config.json"),
        log=read_log(root / "run" / "log.jsonl"),
        rows=results.get("rows", []),
        remark=str(results.get("remark", "")),
        samples=read_samples(root),
        previews=[(path.stem, path) for path in sorted((root / "previews").glob("step-*.png"))],
        skipped=_parse(root / "skipped.json", "[]"),
        machine=_object(root / "run" / "machine.json"),
    )


def render(run: Run) -> str:
    """The page."""
    return fill(
        "report.html.jinja",
        name=run.name,
        teacher=run.config.get("teacher"),
        figures=parts.headline(run.config, run.rows, run.log),
        samples=parts.samples(run.samples),
        scores=parts.scores(run.rows, run.remark),
        training=parts.training(run.log),
        previews=parts.previews(run.previews),
        cost=parts.cost(run.config, run.log, run.machine),
        skipped=run.skipped,
        settings=parts.settings(run.config),
    )


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _parse(path: Path, default: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8") if path.exists() else default)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); remove it and run the same command again") from error


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a run's `log.jsonl`, none where it has not begun.

    Raises:
        InputError: it is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable log ({error}); remove it and run the same command again") from error
