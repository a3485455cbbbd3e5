"""What `quality.py` shows of its measurements: a table, a plot and a grid of pictures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lcm_core.files.atomic import atomic_write
from lcm_core.pipeline.image import labelled_grid

Row = dict[str, str]
SCORES = ("fd", "recall", "alignment", "seen_alignment", "held_out_alignment", "images_per_second")
DIGITS = {"fd": 2, "images_per_second": 1}
PICTURE_STEPS = (1, 4)
PLOTTED = ("solvers", "embedded", "methods", "coarse")


def show(rows: Sequence[Row], output: Path, samples: Path, prompts: Sequence[str]) -> None:
    """Write `table.md`, `plot.png` and `pictures.png` from what was measured so far, and print the table."""
    lines = summarise(rows)
    text = "\n".join(to_table(part, [line for line in lines if line["part"] == part]) for part in parts_of(lines))
    with atomic_write(output / "table.md") as temporary:
        temporary.write_text(text)
    print(text)
    if lines:
        draw_plot(lines, output / "plot.png")
    draw_pictures(output / "pictures.png", samples, prompts)


def parts_of(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The parts in the order in which they come."""
    return list(dict.fromkeys(line["part"] for line in lines))


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One line for all seeds of a run at one number of steps: the mean of each score, and its standard deviation."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row["part"], row["name"], row["student"], row["share"], row["steps"])
        groups.setdefault(key, []).append(row)
    lines = []
    for (part, name, student, share, steps), members in groups.items():
        line: dict[str, Any] = {"part": part, "name": name, "student": student, "share": share, "steps": int(steps)}
        line["seeds"] = len(members)
        for column in ("samples_seen", "seconds"):
            line[column] = statistics.mean(float(row[column]) for row in members)
        for column in SCORES:
            values = [float(row[column]) for row in members]
            line[column] = statistics.mean(values)
            line[f"{column}_spread"] = statistics.stdev(values) if len(values) > 1 else None
        lines.append(line)
    return lines


def to_table(part: str, lines: Sequence[dict[str, Any]]) -> str:
    """One part's table in Markdown."""
    heads = [
        "",
        "student",
        "time",
        "samples",
        "s",
        "steps",
        "FD",
        "recall",
        "alignment",
        "seen",
        "held out",
        "images/s",
    ]
    body = []
    for line in lines:
        cost = [line["share"], f"{line['samples_seen']:,.0f}", f"{line['seconds']:.0f}"]
        body.append([line["name"], line["student"], *cost, str(line["steps"]), *(score(line, c) for c in SCORES)])
    rule = ["---", "---", *["--:"] * (len(heads) - 2)]
    return f"## {part}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in [heads, rule, *body])


def score(line: dict[str, Any], column: str) -> str:
    """A mean, and behind it the spread over the seeds where there are several."""
    digits, spread = DIGITS.get(column, 3), line[f"{column}_spread"]
    return f"{line[column]:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def draw_plot(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """FD against steps, and against milliseconds a picture, of every solver, embedded model and method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(14, 5), sharey=True, layout="constrained")
    curves: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        if line["part"] in PLOTTED:
            curves.setdefault((line["name"], line["student"], line["share"]), []).append(line)
    names = list(dict.fromkeys(name for name, _, _ in curves))
    for (name, student, share), points in curves.items():
        points.sort(key=lambda point: point["steps"])
        look = {"teacher": ":", "lora": "--", "full": "-"}[student]
        style = {"color": plt.colormaps["tab20"](names.index(name)), "linestyle": look, "markersize": 5}
        style["marker"], time = ("o", "") if share == "1" else ("*", f", {share} x time")
        distances = [point["fd"] for point in points]
        for axis, xs in (
            (axes[0], [point["steps"] for point in points]),
            (axes[1], [1000 / point["images_per_second"] for point in points]),
        ):
            axis.plot(xs, distances, label=f"{name}, {student}{time}", **style)
    axes[0].set_xscale("log", base=2)
    axes[0].set(xlabel="steps", ylabel="FD (lower is better)")
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[1].set(xlabel="milliseconds a picture", xscale="log")
    floor = [line["fd"] for line in lines if line["part"] == "floor"]
    for axis in axes:
        axis.set_yscale("log")
        if floor:
            axis.axhline(max(floor), color="grey", label="the drawings through the VAE")
        for scale in (axis.yaxis, axes[1].xaxis):  # plain numbers, where there would be powers of ten
            scale.set_major_formatter("{x:g}")
            scale.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def draw_pictures(file: Path, samples: Path, prompts: Sequence[str]) -> None:
    """A grid of the same prompts and seeds by every student that was trained here."""
    folders = sorted(path for path in samples.iterdir()) if samples.is_dir() else []
    if not folders:
        return
    columns = [(folder, steps) for folder in folders for steps in PICTURE_STEPS]
    rows = [
        [Image.open(folder / f"{number}-{steps}.png") for folder, steps in columns] for number in range(len(prompts))
    ]
    labels = [f"{folder.name}, {steps}" for folder, steps in columns]
    with atomic_write(file) as temporary:
        labelled_grid(rows, labels, prompts).save(temporary, "PNG")
