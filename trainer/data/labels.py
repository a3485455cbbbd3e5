"""Pictures of class-conditional models: their class stands where others have a caption."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lcm_core.errors import InputError
from lcm_core.families.labels import ClassLabels
from trainer.data.items import FoundData, Item
from trainer.data.sources import read_source

FOLDER = "folder"
"""`DataConfig.labels` that stands for the names of folders."""


def read_labelled(path: Path, labels: str, classes: ClassLabels | None, folder_names: bool = False) -> FoundData:
    """The pictures of some data, as `read_source` lists them, with labels for captions where that is asked for.

    Args:
        path: the data.
        labels: folder, or the name of a column; empty for captions, or with `classes` for folders.
        classes: of a class-conditional teacher.
        folder_names: see `read_folders`.

    Raises:
        InputError: as `read_source`; or a column that no picture has, or a class that the teacher does not know.
    """
    column, by_folder = column_of(labels, classes)
    source = read_source(path, column, folder_names)
    if by_folder:
        source = replace(source, items=[replace(item, caption=folder_of(item.key)) for item in source.items])
    elif column and not any(item.caption for item in source.items):
        raise InputError(f"data {path} has no labels {column!r}; name a column that it has, or {FOLDER!r}")
    if classes is not None:
        _check(source.items, classes, path)
    return source


def column_of(labels: str, classes: ClassLabels | None) -> tuple[str, bool]:
    """The column that captions or labels are read from, empty for captions; and whether folders name the labels."""
    by_folder = labels == FOLDER or (not labels and classes is not None)
    return "" if by_folder else labels, by_folder


def folder_of(key: str) -> str:
    """The last folder on the way to a picture; none for one that lies in the data's own."""
    return posixpath.basename(posixpath.dirname(key))


def check_label(name: str, classes: ClassLabels, path: Path | str) -> None:
    """Refuse a class that the teacher does not know.

    Raises:
        InputError: names it, and the data.
    """
    try:
        classes.number(name)
    except InputError as error:
        what = f"class {name!r}" if name else "a picture without a class"
        raise InputError(f"data {path} has {what}: {error}") from error


def _check(items: Sequence[Item], classes: ClassLabels, path: Path) -> None:
    for name in dict.fromkeys(item.caption for item in items):
        check_label(name, classes, path)
