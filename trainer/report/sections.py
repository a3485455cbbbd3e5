"""What each section of the report shows, as plain data; nothing where there is nothing to show.

`report.html.jinja` turns it into HTML and escapes all text: prompts, paths, names and reasons come from users.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

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


@dataclass(frozen=True)
class Embedded:
    """A picture inside the page."""

    source: str
    """A data: address, which holds the whole file."""
    width: int
    height: int
    words: str
    """What it shows, for those who cannot see it."""


@dataclass(frozen=True)
class Strip:
    """One model's pictures of a prompt, one for each number of steps."""

    role: str
    style: str
    cells: Sequence[tuple[str, Embedded | None]]
    """Caption and picture; None where there is none."""


@dataclass(frozen=True)
class Prompt:
    """One prompt's pictures, a strip for each model."""

    prompt: str
    seed: str
    strips: Sequence[Strip]


@dataclass(frozen=True)
class Samples:
    """Pictures of all prompts."""

    note: str
    wide: bool
    """Pictures so large that prompts do not fit beside each other."""
    prompts: Sequence[Prompt]


@dataclass(frozen=True)
class Cell:
    """One value of the table of scores."""

    text: str
    is_number: bool
    is_best: bool = False


@dataclass(frozen=True)
class Scores:
    """The table of scores and its charts."""

    remark: str
    head: Sequence[Cell]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    """CSS class and cells of each row."""
    charts: Sequence[Markup]


def headline(
    config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], log: Sequence[Mapping[str, float]]
) -> list[tuple[str, str, str]]:
    """Name, value and remark of the few figures that everybody looks for first."""
    figures = _score_figures(rows)
    if log:
        figures.append(("steps", f"{len(log):,}", ""))
        facts = training_facts(config, log)
        figures += [(name, value, "") for name, value in facts.items() if name in ("training", "peak memory")]
    return figures


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


def samples(found: Sequence[Sample]) -> Samples | None:
    """The samples: for each prompt, the teacher's pictures above the student's, a column for each number of steps."""
    if not found:
        return None
    roles = sorted({s.role for s in found}, key=lambda role: (role != TEACHER, role))
    steps = sorted({s.steps for s in found})
    prompts = []
    for index in sorted({s.index for s in found}):
        painted = {(s.role, s.steps): s for s in found if s.index == index}
        about = next(iter(painted.values())).settings
        strips = [_strip(role, {number: painted.get((role, number)) for number in steps}) for role in roles]
        prompts.append(Prompt(str(about.get("prompt", "")), str(about.get("seed")), strips))
    return Samples(
        note=" · ".join(_how(next(s for s in found if s.role == role)) for role in roles),
        wide=open_image(found[0].path).width > _LOSSLESS_SIDE,
        prompts=prompts,
    )


def _how(sample: Sample) -> str:
    settings = sample.settings
    guidance = float(settings.get("guidance_scale", 1))
    return f"{sample.role}: sampler {settings.get('sampler')}, guidance {guidance:g}"


def _strip(role: str, painted: Mapping[int, Sample | None]) -> Strip:
    cells: list[tuple[str, Embedded | None]] = []
    for number, sample in painted.items():
        label = plural(number, "step")
        cells.append((label, None if sample is None else embed(sample.path, f"{role}, {label}")))
    return Strip(role, _style_of(role), cells)


def _style_of(model: str) -> str:
    return TEACHER if model == TEACHER else "student"


def scores(rows: Sequence[Mapping[str, Any]], remark: str) -> Scores | None:
    """The table, with the best of each column, and the scores as charts."""
    if not rows:
        return None
    columns = used_columns(rows)
    best = {name: best_of(rows, name) for name in columns}
    charts = [_score_chart(rows, name) for name in ("fd", "fid", "recall", "alignment", "clip_score")]
    return Scores(
        remark,
        head=[Cell(COLUMNS[name][0], bool(COLUMNS[name][1])) for name in columns],
        rows=[(_style_of(row["model"]), [_score_cell(row, name, best[name]) for name in columns]) for row in rows],
        charts=charts,
    )


def _score_cell(row: Mapping[str, Any], column: str, best: float | None) -> Cell:
    is_best = best is not None and row.get(column) == best
    return Cell(format_cell(row, column), bool(COLUMNS[column][1]), is_best)


def _score_chart(rows: Sequence[Mapping[str, Any]], column: str) -> Markup:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(column) is not None:
            lines.setdefault(f"{row['model']}, {row['sampler']}", []).append((row["steps"], row[column]))
    if not any(len(points) > 1 for points in lines.values()):
        return Markup()
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


def training(log: Sequence[Mapping[str, float]]) -> list[Markup]:
    """The loss of every step, thin, and its moving average, thick; beside it the learning rate."""
    losses = [(line["step"], line["loss"]) for line in log if "loss" in line]
    rates = [(line["step"], line["learning_rate"]) for line in log if "learning_rate" in line]
    if not losses:
        return []
    series = [Series("each step", losses, "raw"), Series("moving average", smooth(losses), "student")]
    return [
        line_chart("Loss", series, "optimiser steps", "loss", log_y=True),
        line_chart("Learning rate", [Series("learning rate", rates, "teacher")], "optimiser steps", "rate"),
    ]


def previews(found: Sequence[tuple[str, Path]]) -> list[tuple[str, Embedded]]:
    """Caption and grid, in the order of painting; of many, an even choice with the first and the last."""
    count = min(len(found), MOST_PREVIEWS)
    chosen = [found[round(i * (len(found) - 1) / max(count - 1, 1))] for i in range(count)]
    return [(_step_words(stem), embed(path, stem, largest=2 * LARGEST_SHOWN)) for stem, path in chosen]


def _step_words(stem: str) -> str:
    number = stem.removeprefix("step-")
    return f"step {int(number):,}" if number.isdigit() else stem


def cost(config: Mapping[str, Any], log: Sequence[Mapping[str, float]], machine: Mapping[str, Any]) -> dict[str, str]:
    """Time, pictures, memory and the machine."""
    return training_facts(config, log) | {str(name): str(value) for name, value in machine.items()}


def training_facts(config: Mapping[str, Any], log: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What the training took, by name, as far as the log says."""
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


def settings(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Every setting of the run, in groups."""
    top = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    groups = {"run": top, **{key: value for key, value in config.items() if isinstance(value, Mapping)}}
    return {name: flatten(values) for name, values in groups.items() if values}


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


def embed(path: Path, words: str, largest: int = LARGEST_SHOWN) -> Embedded:
    """A picture for the page, scaled down to `largest` pixels at most."""
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
    return Embedded(f"data:image/{kind};base64,{data}", image.width, image.height, words)


def duration(seconds: float) -> str:
    """`8 s`, `12 min`, `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def size(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
