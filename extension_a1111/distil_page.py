"""The status of a run as HTML, for the tab."""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from extension_a1111.distil import Plan
from extension_a1111.distil_status import SHOWN, Status
from extension_a1111.translation import Say, english

_STATES = {
    "none": "No run yet.",
    "making": "Making the trainer's Python: some gigabytes are fetched.",
    "running": "Running.",
    "stopping": "Stopping: saving the state after this step.",
    "stopped": "Stopped. It can be continued from here.",
    "finished": "Finished.",
    "failed": "Failed.",
    "interrupted": "Ended without a word. It can be continued from the last saved state.",
}
_LABELS = (
    "reading the data once",
    "checking cached latents",
    "checking cached text",
    "caching latents",
    "caching text",
)
"""What the trainer counts before it trains."""
_MEASURED = re.compile(r"loss (?P<loss>[^,]*), (?P<speed>[^,]*) images/s, peak (?P<memory>[^,]*) GB")
_WRONG = "border-left:4px solid #dc2626;background:rgba(220,38,38,.12);padding:.5em .8em;border-radius:4px"
_SAMPLE_PIXELS, _PREVIEW_PIXELS = 192, 1024  # the longer side of pictures inside the page


def said(words: str) -> str:
    """An answer to a button."""
    return f"<p>{escape(words)}</p>"


def mistake(words: str) -> str:
    """What went wrong, as it is seen at once."""
    return f'<p class="error" role="alert" style="{_WRONG}">{escape(words)}</p>'


def described(plan: Plan, say: Say = english) -> str:
    """What a run will need."""
    lines = [
        say("Preset: {preset}", preset=plan.preset),
        say("Memory at the peak: {memory}", memory=plan.memory),
        say("Disk space: {disk}", disk=plan.disk),
        say("Time: about {time}", time=plan.time)
        if plan.time
        else say("Time: nothing like it was measured yet; start, stop after a minute, and look again"),
    ]
    return "".join(f"<div>{escape(line)}</div>" for line in lines)


def render(status: Status, say: Say = english, report: str = "") -> str:
    """The status: one line in words, a bar, the curve of the loss, pictures.

    Args:
        status: what is shown.
        say: the user's language.
        report: address of the run's report, where it can be opened.
    """
    title = f"<b>{escape(status.name)}</b> " if status.name else ""
    # gradio fades what is being updated; every two seconds that is a flicker
    parts = ["<style>#lcm_distil_view .pending {opacity: 1}</style>"]
    parts += [f'<p class="lcm-state-{status.state}">{title}{escape(say(_STATES[status.state]))}</p>']
    if status.lora:
        parts.append(f"<p>{escape(say('LoRA: {path}', path=status.lora))}</p>")
    if status.folder:
        parts.append(f"<p>{escape(say('All files: {path}', path=status.folder))}</p>")
    if report:
        link = f'<a href="{escape(report)}" target="_blank">{escape(say("Open the report"))}</a>'
        parts.append(f"<p>{link}</p>")
    if status.message:
        parts.append(mistake(say(status.frame, words=status.message)))
    if status.total:
        parts.append(_bar(status, say))
    if len(status.losses) > 1:
        parts.append(_curve(status.losses, say))
    if status.pairs:
        parts.append(_side_by_side(status.pairs, say))
    elif status.previews:
        parts.append(_over_the_steps(status.previews, say))
    return "\n".join(parts)


def _bar(status: Status, say: Say) -> str:
    share = 100 * status.done / status.total
    words = "loss {loss}, {speed} pictures a second, {memory} GB at the peak"
    details = _MEASURED.sub(lambda found: say(words, **found.groupdict()), status.details)
    counted = {"done": status.done, "total": status.total, "details": details}
    if status.label == "run":
        said = say("step {done} of {total} ({details})", **counted)
    else:
        label = say(status.label) if status.label in _LABELS else status.label
        said = say("{label} {done} of {total} ({details})", label=label, **counted).strip()
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


def _side_by_side(pairs: Sequence[tuple[Path, Path]], say: Say) -> str:
    """Rows of teacher and student, as many pairs beside each other as there is room for."""
    teacher, student = SHOWN.values()
    heading = say("Teacher with {teacher} steps, student with {student} steps", teacher=teacher, student=student)
    both = '<div style="display:flex;gap:2px">'
    figures = [f"{both}{''.join(_picture(file, _SAMPLE_PIXELS) for file in pair)}</div>" for pair in pairs]
    row = '<div class="lcm-pairs" style="display:flex;flex-wrap:wrap;gap:12px">'
    return f"<p>{escape(heading)}</p>{row}{''.join(figures)}</div>"


def _over_the_steps(previews: Sequence[Path], say: Say) -> str:
    """A column for each preview, so that a row is one prompt through the training."""
    columns = []
    for file in previews:
        step = say("step {last}", last=int(file.stem.rpartition("-")[2]))
        columns.append(f"<div>{escape(step)}{_picture(file, _PREVIEW_PIXELS)}</div>")
    return f'<div style="display:flex;gap:4px;overflow-x:auto">{"".join(columns)}</div>'


def _picture(path: Path, pixels: int) -> str:
    """The picture inside the page, which may not fetch files from outside of the web UI's folders."""
    data = _thumbnail(str(path), path.stat().st_mtime_ns, pixels)
    return f'<img src="data:image/webp;base64,{data}" alt="{escape(path.stem)}" style="max-width:100%">'


@functools.lru_cache(maxsize=32)
def _thumbnail(path: str, modified: int, pixels: int) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        picture.thumbnail((pixels, pixels))
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "WEBP", quality=90)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
