"""How a run is doing, read from the files of its folder, and as HTML."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from extension_a1111.distil import JOB, Places, current, is_running, read_json
from extension_a1111.words import Say, english

_TAIL = 512 * 1024  # bytes of a log that are read: the last thousands of steps
_POINTS = 400  # of the curve
_BAR = re.compile(r"(?P<label>[^\r\n|]*?):?\s*\d+%\|[^|]*\|\s*(?P<done>\d+)/(?P<total>\d+) \[(?P<rest>[^\]]*)\]")
_STATES = {
    "none": "No run yet.",
    "running": "Running.",
    "stopping": "Stopping: saving the state after this step.",
    "stopped": "Stopped. It can be continued from here.",
    "finished": "Finished.",
    "failed": "Failed.",
    "interrupted": "Ended without a word. It can be continued from the last saved state.",
}


@dataclass(frozen=True)
class Status:
    """One look at a run."""

    state: str
    """A key of `_STATES`."""
    name: str = ""
    label: str = ""
    """What is being counted: the cache, the training, the final table."""
    done: int = 0
    total: int = 0
    details: str = ""
    """Speed, time left and loss, as the trainer's progress bar says them."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss), thinned out."""
    preview: Path | None = None
    folder: str = ""
    """Where all files of the run are."""
    lora: str = ""
    message: str = ""
    """What went wrong, or the last words."""


def look(places: Places) -> Status:
    """The state of the last run."""
    name = current(places)
    if name is None:
        return Status("none")
    run = places.root / name
    job = run / JOB
    ended, handed = read_json(job / "exit.json"), read_json(job / "lora.json")
    state = _state(places, job, ended)
    log = _tail(job / "run.log")
    bars = list(_BAR.finditer(log))
    bar = bars[-1] if bars else None
    message = ended.get("error") or handed.get("error") or ""
    if state in ("failed", "interrupted") and not message:
        message = next((line.strip() for line in reversed(re.split(r"[\r\n]+", log)) if line.strip()), "")
    return Status(
        state,
        name,
        label=bar["label"].strip() if bar else "",
        done=int(bar["done"]) if bar else 0,
        total=int(bar["total"]) if bar else 0,
        details=bar["rest"] if bar else "",
        losses=read_losses(run / "run" / "log.jsonl"),
        preview=max((run / "previews").glob("*.png"), default=None),
        folder=str(run),
        lora=ended.get("lora") or handed.get("lora") or "",
        message=message,
    )


def _state(places: Places, job: Path, ended: dict) -> str:
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


def render(status: Status, say: Say = english) -> str:
    """The status as HTML: one line in words, a bar, the curve of the loss, the last preview."""
    title = f"<b>{escape(status.name)}</b> " if status.name else ""
    # gradio fades what is being updated; every two seconds that is a flicker
    parts = ["<style>#lcm_distil_view .pending {opacity: 1}</style>"]
    parts += [f'<p class="lcm-state-{status.state}">{title}{escape(say(_STATES[status.state]))}</p>']
    if status.lora:
        parts.append(f"<p>{escape(say('LoRA: {path}', path=status.lora))}</p>")
    if status.folder:
        parts.append(f"<p>{escape(say('All files: {path}', path=status.folder))}</p>")
    if status.message:
        parts.append(f'<p class="error">{escape(status.message)}</p>')
    if status.total:
        parts.append(_bar(status, say))
    if len(status.losses) > 1:
        parts.append(_curve(status.losses, say))
    if status.preview is not None:
        parts.append(_picture(status.preview))
    return "\n".join(parts)


def _bar(status: Status, say: Say) -> str:
    share = 100 * status.done / status.total
    counted = {"done": status.done, "total": status.total, "details": status.details}
    if status.label == "run":
        said = say("step {done} of {total} ({details})", **counted)
    else:
        said = say("{label} {done} of {total} ({details})", label=status.label, **counted).strip()
    return (
        '<div style="background:rgba(128,128,128,.25);border-radius:4px;height:8px">'
        f'<div style="background:#3b82f6;border-radius:4px;height:8px;width:{share:.1f}%"></div></div>'
        f"<p>{escape(said)}</p>"
    )


def _curve(losses: Sequence[tuple[int, float]], say: Say, width: int = 640, height: int = 160) -> str:
    """The loss over the steps as SVG."""
    first, last = losses[0][0], losses[-1][0]
    low, high = min(loss for _, loss in losses), max(loss for _, loss in losses)
    spread = high - low or 1.0
    points = " ".join(
        f"{(step - first) / max(last - first, 1) * width:.1f},{(high - loss) / spread * height:.1f}"
        for step, loss in losses
    )
    return (
        f'<svg viewBox="-4 -16 {width + 8} {height + 36}" style="max-width:{width}px;width:100%" role="img">'
        f"<title>{escape(say('loss, steps {first} to {last}', first=first, last=last))}</title>"
        f'<polyline points="{points}" fill="none" stroke="#3b82f6" stroke-width="1.5"/>'
        f'<g fill="currentColor" font-size="11"><text y="-4">{escape(say("loss {loss}", loss=f"{high:.4g}"))}</text>'
        f'<text y="{height + 14}">{low:.4g}</text>'
        f'<text x="{width}" y="{height + 14}" text-anchor="end">'
        f"{escape(say('step {last}', last=last))}</text></g></svg>"
    )


def _picture(path: Path) -> str:
    """The picture inside the page, which may not fetch files from outside of the web UI's folders."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(path.stem)}" style="max-width:100%">'


def _tail(path: Path) -> str:
    """The end of a text file; nothing where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - _TAIL, 0))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
