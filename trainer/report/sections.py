"""The sections of the report, each from plain data to HTML; an empty string where there is nothing to show.

All text that comes from a user (prompts, paths, names, reasons) goes through `escape`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lcm_core.cli.common import plural
from lcm_core.pipeline.image import open_image
from trainer.report.charts import Series, line_chart, smooth
from trainer.report.preview import Sample
from trainer.report.tables import COLUMNS, best_of, format_cell, used_columns

LARGEST_SHOWN = 384
"""Pixels; larger pictures are scaled down for the page, the originals are beside it."""
MOST_PREVIEWS = 12
TEACHER = "teacher"
_LOSSLESS_SIDE = 160  # small pictures are shown enlarged, where a lossy format would be seen


def headline(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], log: Sequence[Mapping[str, float]]) -> str:
    """What was done, in one line, and the few figures that everybody looks for first."""
    teacher = config.get("teacher")
    sentence = f"<p>distilled from <b>{escape(str(teacher))}</b></p>" if teacher else ""
    figures = _score_figures(rows)
    if log:
        figures.append(("steps", f"{len(log):,}", ""))
        figures += [
            (name, value, "") for name, value in _cost(config, log).items() if name in ("training", "peak memory")
        ]
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(remark)}</small></div>"
        for name, value, remark in figures
    )
    return f'{sentence}<dl class="figures">{tiles}</dl>' if tiles else sentence


def _score_figures(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The student's Frechet distance at 4 steps beside the teacher's at as many."""
    for name, title in (("fd", "FD"), ("fid", "FID")):
        students = [r for r in rows if r.get(name) is not None and r["model"] != TEACHER and r["steps"] == 4]
        teachers = [r for r in rows if r.get(name) is not None and r["model"] == TEACHER and r["steps"] == 4]
        if students:
            best = min(r[name] for r in students)
            beside = f"teacher {min(r[name] for r in teachers):.2f}" if teachers else ""
            return [(f"{title} at 4 steps", f"{best:.2f}", beside)]
    return []


def samples(found: Sequence[Sample]) -> str:
    """For each prompt, the teacher's pictures above the student's, a column for each number of steps."""
    if not found:
        return ""
    cells = {(s.index, s.role, s.steps): s for s in found}
    roles = sorted({s.role for s in found}, key=lambda role: (role != TEACHER, role))
    steps = sorted({s.steps for s in found})
    blocks = []
    for index in sorted({s.index for s in found}):
        about = next(s.settings for s in found if s.index == index)
        strips = "".join(_strip(role, [cells.get((index, role, number)) for number in steps], steps) for role in roles)
        prompt, seed = escape(str(about.get("prompt", ""))) or "<i>empty prompt</i>", escape(str(about.get("seed")))
        blocks.append(f'<article class="prompt"><h3>{prompt} <small>seed {seed}</small></h3>{strips}</article>')
    wide = " wide" if open_image(found[0].path).width > _LOSSLESS_SIDE else ""
    note = " · ".join(_how(next(s for s in found if s.role == role)) for role in roles)
    return f'<p class="note">{note}. Same prompts, same seeds.</p><div class="prompts{wide}">{"".join(blocks)}</div>'


def _how(sample: Sample) -> str:
    settings = sample.settings
    return escape(
        f"{sample.role}: sampler {settings.get('sampler')}, guidance {float(settings.get('guidance_scale', 1)):g}"
    )


def _strip(role: str, cells: Sequence[Sample | None], steps: Sequence[int]) -> str:
    figures = []
    for cell, number in zip(cells, steps, strict=True):
        label = plural(number, "step")
        content = '<span class="empty"></span>' if cell is None else picture(cell.path, f"{role}, {label}")
        figures.append(f"<figure>{content}<figcaption>{label}</figcaption></figure>")
    style = TEACHER if role == TEACHER else "student"
    return f'<div class="strip {style}" style="--n:{len(steps)}"><b>{escape(role)}</b>{"".join(figures)}</div>'


def scores(rows: Sequence[Mapping[str, Any]], remark: str) -> str:
    """The table, with the best of each column set bold, and the Frechet distance as a chart."""
    if not rows:
        return ""
    columns = used_columns(rows)
    best = {name: best_of(rows, name) for name in columns}
    head = "".join(f"<th{_number_class(name)}>{escape(COLUMNS[name][0])}</th>" for name in columns)
    lines = []
    for row in rows:
        marked = TEACHER if row["model"] == TEACHER else "student"
        cells = "".join(_score_cell(row, name, best[name]) for name in columns)
        lines.append(f'<tr class="{marked}">{cells}</tr>')
    table = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    charts = "".join(_score_chart(rows, name) for name in ("fd", "fid", "recall", "alignment", "clip_score"))
    return f'<p class="note">{escape(remark)}</p>{table}<div class="charts">{charts}</div>'


def _number_class(column: str) -> str:
    return ' class="number"' if COLUMNS[column][1] else ""


def _score_cell(row: Mapping[str, Any], column: str, best: float | None) -> str:
    text = escape(format_cell(row, column))
    if best is not None and row.get(column) == best:
        text = f"<b>{text}</b>"
    return f"<td{_number_class(column)}>{text}</td>"


def _score_chart(rows: Sequence[Mapping[str, Any]], column: str) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(column) is not None:
            lines.setdefault(f"{row['model']}, {row['sampler']}", []).append((row["steps"], row[column]))
    if not any(len(points) > 1 for points in lines.values()):
        return ""
    series = [
        Series(name, sorted(points), _line_style(name, list(lines)), marks=True) for name, points in lines.items()
    ]
    ticks = sorted({x for points in lines.values() for x, _ in points})
    title = COLUMNS[column][0]
    return line_chart(f"{title} by steps", series, "steps", title, log_x=True, log_y=column == "fd", x_ticks=ticks)


def _line_style(name: str, names: Sequence[str]) -> str:
    """The teacher's colour or the student's; further lines of the same one are dashed."""
    is_teacher = name.startswith(f"{TEACHER},")
    alike = [other for other in names if other.startswith(f"{TEACHER},") == is_teacher]
    return (TEACHER if is_teacher else "student") + (" other" if alike.index(name) else "")


def training(log: Sequence[Mapping[str, float]]) -> str:
    """The loss of every step, thin, and its moving average, thick; beside it the learning rate."""
    losses = [(line["step"], line["loss"]) for line in log if "loss" in line]
    rates = [(line["step"], line["learning_rate"]) for line in log if "learning_rate" in line]
    if not losses:
        return ""
    series = [Series("each step", losses, "raw"), Series("moving average", smooth(losses), "student")]
    charts = line_chart("Loss", series, "optimiser steps", "loss", log_y=True)
    charts += line_chart("Learning rate", [Series("learning rate", rates, "teacher")], "optimiser steps", "rate")
    return f'<div class="charts">{charts}</div>'


def previews(found: Sequence[tuple[str, Path]]) -> str:
    """Preview grids in the order in which they were painted; of many, an even choice with the first and the last."""
    if not found:
        return ""
    count = min(len(found), MOST_PREVIEWS)
    chosen = [found[round(i * (len(found) - 1) / max(count - 1, 1))] for i in range(count)]
    figures = "".join(
        f"<figure>{picture(path, stem, largest=2 * LARGEST_SHOWN)}<figcaption>{escape(_step_words(stem))}</figcaption>"
        "</figure>"
        for stem, path in chosen
    )
    return f'<div class="film">{figures}</div>'


def _step_words(stem: str) -> str:
    number = stem.removeprefix("step-")
    return f"step {int(number):,}" if number.isdigit() else stem


def cost(config: Mapping[str, Any], log: Sequence[Mapping[str, float]], machine: Mapping[str, Any]) -> str:
    """Time, pictures, memory and the machine."""
    return _facts(_cost(config, log) | {str(name): str(value) for name, value in machine.items()})


def _cost(config: Mapping[str, Any], log: Sequence[Mapping[str, float]]) -> dict[str, str]:
    seconds = sum(line.get("seconds", 0.0) for line in log)
    images = len(log) * config.get("training", {}).get("batch_size", 0)
    peak = max((line.get("peak_memory", 0) for line in log), default=0)
    facts: dict[str, str] = {}
    if seconds:
        facts |= {"training": duration(seconds), "time a step": f"{seconds / len(log):,.3g} s"}
    if images:
        facts["images seen"] = f"{images:,}"
    if images and seconds:
        facts["images a second"] = f"{images / seconds:,.2f}"
    if peak:
        facts["peak memory"] = size(peak)
    return facts


def skipped(found: Sequence[Sequence[str]]) -> str:
    """Every picture that could not be used, with the reason."""
    if not found:
        return ""
    lines = "".join(f"<tr><td>{escape(str(name))}</td><td>{escape(str(why))}</td></tr>" for name, why in found)
    return (
        f"<p>{plural(len(found), 'picture')} could not be used.</p><details{' open' * (len(found) <= 20)}>"
        f'<summary>names and reasons</summary><div class="scroll"><table>{lines}</table></div></details>'
    )


def settings(config: Mapping[str, Any]) -> str:
    """Every setting of the run, in groups."""
    if not config:
        return ""
    top = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    groups = {"run": top, **{key: value for key, value in config.items() if isinstance(value, Mapping)}}
    tables = "".join(
        f"<div><h3>{escape(str(name))}</h3>{_facts(flatten(values))}</div>" for name, values in groups.items() if values
    )
    return f'<div class="settings">{tables}</div>'


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names with their values as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) or "none"
        else:
            flat[f"{prefix}{key}"] = "none" if value is None else str(value)
    return flat


def _facts(facts: Mapping[str, str]) -> str:
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f'<div class="scroll"><table class="facts">{lines}</table></div>' if lines else ""


def picture(path: Path, words: str, largest: int = LARGEST_SHOWN) -> str:
    """A picture inside the page."""
    image = open_image(path).convert("RGB")
    buffer = io.BytesIO()
    if max(image.size) <= _LOSSLESS_SIDE:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        kind = "webp"
        image.thumbnail((largest, largest))
        image.save(buffer, "WEBP", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/{kind};base64,{data}" width="{image.width}" height="{image.height}" '
        f'alt="{escape(words)}">'
    )


def duration(seconds: float) -> str:
    """`8 s`, `12 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def size(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
