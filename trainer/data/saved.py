"""Pictures in a folder that the `datasets` library saved to disk; that library must be installed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.errors import InputError
from trainer.data.items import CAPTION_KEYS, FoundData, Item, Skipped, decode, find_caption, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image


def is_saved(path: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def read_saved(path: Path, column: str = "") -> FoundData:
    """List the rows of a saved data set; of several splits, `train`. A column of classes is read by their names.

    Raises:
        InputError: `datasets` is not installed, the folder is damaged, or has no column of pictures.
    """
    table = _load(path)
    pictures = _picture_column(path, table)
    words = next((key for key in ((column,) if column else CAPTION_KEYS) if key in table.column_names), None)
    captions = _captions(table, words) if words else [""] * len(table)
    rows = _undecoded(table, pictures)
    items: list[Item] = []
    skipped: Skipped = []
    for number, words in enumerate(captions):
        key = f"row {number}"
        try:
            caption = find_caption({column or "text": words}, key, column)
            items.append(Item(key, caption, partial(_open_row, rows, number, pictures, key)))
        except InputError as error:
            skipped.append((key, str(error)))
    return FoundData(items, sorted({Path(file["filename"]) for file in table.cache_files}), skipped)


def _load(path: Path) -> Any:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise InputError(f"{path} was saved by the datasets library; `pip install datasets` to read it") from None
    try:
        table = load_from_disk(str(path))
    except Exception as error:  # pyarrow and datasets raise their own kinds for each kind of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a whole saved data set ({reason}); save it again") from error
    if isinstance(table, DatasetDict):
        name = "train" if "train" in table else next(iter(table), None)
        if name is None or (name != "train" and len(table) > 1):
            raise InputError(f"{path} has the splits {', '.join(table) or 'none'}; give the folder of one of them")
        table = table[name]
    return table


def _picture_column(path: Path, table: Any) -> str:
    """The first column of pictures."""
    from datasets import Image as Feature

    column = next((name for name, kind in table.features.items() if isinstance(kind, Feature)), None)
    if column is None:
        raise InputError(f"{path} has no column of images (it has: {', '.join(table.column_names)}); cast one to Image")
    return column


def _captions(table: Any, column: str) -> list[Any]:
    names = getattr(table.features[column], "names", None)  # of a column of classes
    return table[column] if names is None else [None if n is None else names[n] for n in table[column]]


def _undecoded(table: Any, column: str) -> Any:
    """Rows whose pictures are bytes as they were stored, so that a broken one can be skipped by us."""
    from datasets import Image as Feature

    return table.select_columns([column]).cast_column(column, Feature(decode=False))


def _open_row(rows: Any, number: int, column: str, key: str) -> Image:
    held = rows[number][column]
    if held is None:
        raise InputError(f"{key} holds no picture; remove it")
    data = held["bytes"]
    return decode(read_bytes(Path(held["path"]), key) if data is None else data, key)
