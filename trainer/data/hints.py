"""Control pictures: what a ControlNet or T2I-Adapter looks at, one for each picture of the data, by its name."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from lcm_core.errors import InputError
from trainer.data.augment import make_variant
from trainer.data.buckets import Size
from trainer.data.hashing import FileHashes
from trainer.data.items import PICTURES, Item, decode, read_bytes
from trainer.data.settings import DataConfig

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Hints:
    """The control pictures in a folder."""

    root: Path
    names: Mapping[str, str]
    """Path in the folder without its suffix -> with it."""

    def file(self, item: Item) -> Path:
        """The control picture of a picture.

        Raises:
            InputError: there is none.
        """
        stem = posixpath.splitext(item.key)[0]
        if stem not in self.names:
            raise InputError(f"there is no control picture {stem}.png (or another kind of picture) in {self.root}")
        return self.root / self.names[stem]

    def open(self, item: Item) -> Image:
        """Decode the control picture of a picture.

        Raises:
            InputError: it is missing, or cannot be read.
        """
        file = self.file(item)
        return decode(read_bytes(file, str(file)), str(file))

    def hashes(self, items: Sequence[Item], hashes: FileHashes) -> list[str]:
        """A hash of the contents of each picture's control picture; empty where there is none."""
        stems = [posixpath.splitext(item.key)[0] for item in items]
        found = [stem for stem in stems if stem in self.names]
        known = dict(zip(found, hashes.each([self.root / self.names[stem] for stem in found]), strict=True))
        return [known.get(stem, "") for stem in stems]

    def variant(self, item: Item, picture: Image, variant: int, buckets: list[Size], config: DataConfig) -> Tensor:
        """The part of a control picture that goes with a variant of its picture, (1, 3, H, W) in [0, 255] as uint8:
        cropped and mirrored alike, in its own colours.

        Raises:
            InputError: it is missing, or cannot be read.
        """
        hint = self.open(item).convert("RGB").resize(picture.size)
        pixels, _ = make_variant(hint, item.key, variant, buckets, replace(config, colour=0.0))
        return ((pixels + 1) * 127.5).round().byte()


def read_hints(path: str) -> Hints | None:
    """The control pictures in a folder and its subfolders; None where no folder is named.

    Raises:
        InputError: it is not there, or two of its pictures differ in their suffixes alone.
    """
    if not path:
        return None
    root, names = Path(path), dict[str, str]()
    if not root.is_dir():
        raise InputError(f"control_pictures {path} is no folder; give one with a picture for each picture of the data")
    for folder, _, files in os.walk(root):
        for file in filter(_is_picture, sorted(files)):
            name = Path(folder, file).relative_to(root).as_posix()
            other = names.setdefault(posixpath.splitext(name)[0], name)
            if other != name:
                raise InputError(f"control_pictures {path} has {other} and {name}; keep one of them")
    return Hints(root, names)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES) and not name.startswith(".")
