"""The work behind the cache: from numbered pictures or captions to the tensors of one shard.

A shard depends on what is in it alone: not on which process makes it, nor on what was made before. Each kind of data
gives the same three things: its captions, what its latents depend on, and a function that makes a shard of latents.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lcm_core.networks.conditioning import flatten
from trainer.data.hashing import FileHashes, hash_json
from trainer.data.items import Skipped
from trainer.data.labels import read_labelled
from trainer.data.pictures import Encoder
from trainer.data.rows import TEXT_CHECKSUMS, row_checksum, small
from trainer.data.settings import DataConfig
from trainer.data.shards import FORMAT, Contents, Maker
from trainer.data.teacher import Teacher

TIME_IDS_NAME = "added_cond_kwargs.time_ids"
"""Part of SDXL's conditioning that is a picture's, not its caption's."""


class Data(Protocol):
    """Numbered pictures, each with a caption; or what stands for pictures."""

    captions: list[str]
    """The captions of all pictures, by number."""
    repeats: Sequence[int]
    """How often each picture comes, by number; none for once."""
    skipped: Skipped
    """(name, reason) of what was found to be of no use before anything was decoded."""

    def identity(self) -> dict[str, Any]:
        """All that the latents depend on, as plain JSON values."""

    def contents(self) -> Contents | None:
        """What each row of the latents is of; None where that is not known."""

    def load(self, device: torch.device) -> Maker:
        """Load the networks that make latents."""


class Images:
    """Pictures that lie on this machine.

    Raises:
        InputError: the data or the resolution cannot be used.
    """

    def __init__(self, config: DataConfig, teacher: Teacher, hashes: FileHashes) -> None:
        self.hashes = hashes
        self.encoder = Encoder(config, teacher)  # before the data, which may take long to list
        self.source = read_labelled(Path(config.path), config.labels, teacher.labels, config.folder_names)
        self.captions = [item.caption for item in self.source.items]
        self.repeats: Sequence[int] = [item.repeats for item in self.source.items]
        self.skipped = self.source.skipped

    def identity(self) -> dict[str, Any]:
        """Pictures, their names (which seed the augmentation), VAE, buckets and augmentation."""
        pictures = {
            "pictures": self.hashes.digest(self.source.files),
            "names": hash_json([item.key for item in self.source.items]),
            **self.encoder.made_by(),
        }
        if (hints := self.encoder.hints) is not None:
            pictures["hint_files"] = hash_json(hints.hashes(self.source.items, self.hashes))
        return pictures | {name: value for name, value in self.encoder.kept_beside().items() if value is not None}

    def contents(self) -> Contents | None:
        """Of pictures in files of their own, or in tars: the file's contents, and the name, a seed."""
        files = [item.file for item in self.source.items]
        if None in files:
            return None

        def keys() -> list[str]:
            known = dict(zip(self.source.files, self.hashes.each(self.source.files), strict=True))
            seeds = [f"{known[item.file]} {item.key}" for item in self.source.items if item.file is not None]
            if self.encoder.hints is None:
                return seeds
            stated = self.encoder.hints.hashes(self.source.items, self.hashes)
            return [f"{seed} {hint}" for seed, hint in zip(seeds, stated, strict=True)]

        return Contents({"latents": self.encoder.made_by() | self.encoder.kept_beside(), "format": FORMAT}, keys)

    def load(self, device: torch.device) -> Maker:
        """Load the VAE, and an IP-Adapter where there is one."""
        encode = self.encoder.load(device)
        return lambda numbers: encode((number, self.source.items[number]) for number in numbers)


def text_maker(captions: Sequence[str], teacher: Teacher, device: torch.device) -> Maker:
    """Load the text encoders. Shards hold conditioning (N, ...) by its dotted names, but for what depends on pictures.

    In float16, which halves the disk and is finer than the bfloat16 that large networks compute in; in that itself
    where a language model's states are too large for it.
    """
    precision = torch.float32 if teacher.source.family is None else None
    text = teacher.open_text(device, precision)
    told = False

    def make(numbers: Sequence[int]) -> dict[str, Tensor]:
        with warnings.catch_warnings(record=True) as cut:
            warnings.simplefilter("always")
            cond = text.encode([captions[number] for number in numbers])
        nonlocal told
        if cut and not told:  # once for all captions, not once for each
            warnings.warn(f"some captions are too long and lose their ends; the first: {cut[0].message}", stacklevel=2)
            told = True
        tensors = {name: small(value).cpu() for name, value in flatten(cond).items() if name != TIME_IDS_NAME}
        rows = [[tensors[name][row] for name in sorted(tensors)] for row in range(len(numbers))]
        return {**tensors, TEXT_CHECKSUMS: torch.tensor([row_checksum(row) for row in rows])}

    return make
