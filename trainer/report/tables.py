"""Scores as a table: the same columns in the terminal, in Markdown and in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
"""What one model scored with one setting; plain JSON values by the names in `COLUMNS`."""

COLUMNS = {
    "model": ("model", ""),
    "sampler": ("sampler", ""),
    "steps": ("steps", "d"),
    "guidance_scale": ("guidance", "g"),
    "fd": ("FD", ".2f"),
    "fid": ("Inception FID", ".2f"),
    "recall": ("recall", ".3f"),
    "style": ("style", ".3f"),
    "alignment": ("alignment", ".3f"),
    "seen_alignment": ("seen pairs", ".3f"),
    "held_out_alignment": ("held-out pairs", ".3f"),
    "clip_score": ("CLIP score", ".2f"),
    "images_per_second": ("images/s", ".1f"),
}
"""Name in a row -> title and number format. Columns that no row has are left out."""
LOWER_IS_BETTER = ("fd", "fid")
HIGHER_IS_BETTER = ("recall", "style", "alignment", "seen_alignment", "held_out_alignment", "clip_score")


def remark(note: Mapping[str, Any], distance: str) -> str:
    """What scores were measured on, and what they can be compared with.

    Args:
        note: of the evaluation, see `trainer.evaluate.scores.Evaluation`.
        distance: name of the Frechet distance in the table.
    """
    words = (
        f"{note['pictures']:,} pictures a row, compared with {note['real']} by {note['features']} features. "
        f"Lower is better for {distance.upper()}, higher for the other scores."
    )
    if distance == "fid" or "emoji" in note["real"]:
        return words
    return (
        f"{words} The features are those of a small network that has seen emoji alone: the rows of this table can be "
        "compared with each other, but not with FID. `python -m trainer eval --inception` measures that."
    )


def used_columns(rows: Sequence[Row]) -> list[str]:
    """The columns for which at least one row has a value."""
    return [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]


def format_cell(row: Row, column: str) -> str:
    """One value as text; a dash where the row has none."""
    value = row.get(column)
    return "-" if value is None else format(value, COLUMNS[column][1])


def best_of(rows: Sequence[Row], column: str) -> float | None:
    """The best value of a column of scores; None for other columns."""
    values = [row[column] for row in rows if row.get(column) is not None]
    if not values or column not in LOWER_IS_BETTER + HIGHER_IS_BETTER:
        return None
    return min(values) if column in LOWER_IS_BETTER else max(values)


def to_markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown whose columns also line up in a terminal."""
    columns = used_columns(rows)
    lines = [[COLUMNS[name][0] for name in columns]]
    lines += [[format_cell(row, name).replace("|", "\\|") for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    is_number = [bool(COLUMNS[name][1]) for name in columns]
    rule = ["-" * (width - 1) + ":" if number else "-" * width for width, number in zip(widths, is_number, strict=True)]
    lines.insert(1, rule)
    return "".join(f"| {' | '.join(_pad(line, widths, is_number))} |\n" for line in lines)


def _pad(cells: Sequence[str], widths: Sequence[int], is_number: Sequence[bool]) -> list[str]:
    return [
        cell.rjust(width) if number else cell.ljust(width)
        for cell, width, number in zip(cells, widths, is_number, strict=True)
    ]
