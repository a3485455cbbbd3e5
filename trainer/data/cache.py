"""The cache of latents and text embeddings: `prepare` makes what is missing, `LatentCache` reads batches from it.

A cache folder holds `latents-<hash>/000000.safetensors` ..., `text-<hash>/000000.safetensors` ... and `files.json`, the
hashes of the data's files. The hashes in the names are of everything that the contents depend on (`about.json` lists
it), so what was made with another VAE, caption or setting is another folder, never mixed and never overwritten. The
data's files are read for their hashes once; later their size and time of change stand for them. Each shard appears
under its name when it is whole, and one that is missing, or not bit by bit what was written, is made again; it is read
for this when its size or time of change is not the one of the last time (`checked.json`).

A finished cache can stand for the pictures as data. Then its index alone is opened, however many pictures it holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
from lcm_core.files.safetensors import PathLike
from lcm_core.networks.device import choose_device
from trainer.data.batches import Batch, LatentCache, Pick
from trainer.data.encode import Data, Images, text_maker
from trainer.data.fill import fill
from trainer.data.hashing import FileHashes, hash_json
from trainer.data.index import check_unchanged, find_index, index_path, write_index
from trainer.data.paint import Prompts, Shipped
from trainer.data.settings import DataConfig
from trainer.data.shards import FORMAT, Contents, Shards, is_unchanged, known_whole, remember_whole
from trainer.data.teacher import Teacher
from trainer.data.versions import write_versions
from trainer.distributed import Processes

__all__ = ["Batch", "CachePlan", "LatentCache", "Pick", "open_data", "plan_cache", "prepare", "write_skipped"]

EMOJI = "emoji"
"""`DataConfig.path` that stands for the shipped drawings."""


@dataclass(frozen=True)
class CachePlan:
    """What a cache is made of and where it goes; made by `plan_cache`, nothing is computed yet."""

    config: DataConfig
    teacher: Teacher
    data: Data
    captions: list[str]
    """Every distinct one, as written; the first is empty."""
    latents: Shards
    texts: Shards

    def hash_pictures(self) -> str:
        """A hash of all that the latents depend on."""
        return _hash_contents(self.latents)

    def hash_captions(self) -> str:
        """A hash of all that the text embeddings depend on."""
        return _hash_contents(self.texts)

    def fill(self, device: torch.device, processes: Processes) -> LatentCache:
        """Compute what is missing or damaged, then open the cache.

        VAE, text encoders and, for an image-free run, the teacher's U-Net are loaded only where something of theirs is
        missing, and released again. Of several processes, each makes every n-th shard.

        Raises:
            InputError: data or teacher that cannot be used, a folder that cannot be written, a full disk.
        """
        if processes.is_main:
            self.latents.begin()
            self.texts.begin()
            processes.wait()
        fill(self.latents, lambda: self.data.load(device), processes, "pictures")
        written = write_versions(self.captions, self.config)
        fill(self.texts, lambda: text_maker(written, self.teacher, device), processes, "captions")
        processes.wait()
        self.latents.check()
        self.texts.check()
        index = index_path(self)
        if processes.is_main:
            if not is_unchanged(index, known_whole(self.latents.folder)):
                write_index(self, index)
            remember_whole(self.latents.folder)
            remember_whole(self.texts.folder)
        processes.wait()
        cache = LatentCache(index, self.config.null_prompt == "zeros", checked=True)
        if processes.is_main:
            write_skipped(self.latents.folder / "skipped.json", cache.skipped)
        return cache


@dataclass(frozen=True)
class FinishedCache:
    """A cache that is given as the data, instead of pictures; nothing of these is looked at."""

    config: DataConfig
    teacher: Teacher
    index: Path

    @cached_property
    def cache(self) -> LatentCache:
        """What it holds."""
        checked = is_unchanged(self.index, known_whole(self.index.parent))
        return LatentCache(self.index, self.config.null_prompt == "zeros", checked)

    @property
    def captions(self) -> list[str]:
        """A few of them, from all over; the index has no more."""
        return self.cache.examples

    def hash_pictures(self) -> str:
        """What `CachePlan.hash_pictures` was."""
        return str(self.cache.about["contents"][0])

    def hash_captions(self) -> str:
        """What `CachePlan.hash_captions` was."""
        return str(self.cache.about["contents"][1])

    def fill(self, device: torch.device, processes: Processes) -> LatentCache:
        """Open it.

        Raises:
            InputError: it is damaged or not complete, belongs to another teacher, or was made with other settings.
        """
        about = self.cache.about
        check_unchanged(about, asdict(self.config), asdict(DataConfig()))
        found = set(os.listdir(self.index.parent))
        names = (f"{number:06d}.safetensors" for number in range(about["shards"]))
        if (gone := next((name for name in names if name not in found), None)) is not None:
            raise InputError(f"{self.index.parent / gone} is missing; fill the cache again")
        for part, value in self.teacher.hash_encoders().items():
            if value != about["made_by"][part]:
                raise InputError(
                    f"the cache {self.config.path} was made with another {part} than that of {self.teacher.name}; "
                    "give the teacher that it was made for"
                )
        return self.cache


def plan_cache(
    config: DataConfig, teacher: Teacher, folder: Path, processes: Processes, prediction_type: str = ""
) -> CachePlan | FinishedCache:
    """Find out what a cache is made of. The data's files are read for their hashes, if that was not done before.

    Args:
        config: the data.
        teacher: whose VAE and text encoders are used.
        folder: of the cache; of several processes, all must see the same.
        processes: the processes that share the work.
        prediction_type: of the teacher, where its own files say it wrongly; for image-free runs.

    Raises:
        InputError: data or teacher that cannot be used.
    """
    if config.path and (index := find_index(Path(config.path))) is not None:
        return FinishedCache(config, teacher, index)
    data = open_data(config, teacher, FileHashes(folder / "files.json"), prediction_type)
    if not processes.is_main:
        processes.wait()  # until the first process has hashed the files, which then need not be read again
    identity = {"latents": data.identity(), "format": FORMAT}
    captions = list(dict.fromkeys(["", *data.captions]))
    written = write_versions(captions, config)
    text_identity = {"captions": hash_json(written), "text": teacher.hash_text(), "format": FORMAT}
    each = 1 if config.is_image_free else config.variant_count  # pictures from one picture of the data
    shard = max(1, config.shard_size // each)
    latents = Shards(folder / "latents", identity, len(data.captions), shard, data.contents())
    about = {name: value for name, value in text_identity.items() if name != "captions"}
    texts = Shards(folder / "text", text_identity, len(written), config.shard_size, Contents(about, lambda: written))
    return CachePlan(config, teacher, data, captions, latents, texts)


def prepare(
    config: DataConfig,
    teacher: PathLike | Teacher,
    folder: Path,
    device: str | torch.device | None = None,
    processes: Processes | None = None,
    prediction_type: str = "",
) -> LatentCache:
    """Compute what is missing of the cache in `folder`, then open it: `plan_cache` and `CachePlan.fill`.

    Args:
        config: the data.
        teacher: the model whose VAE and text encoders are used, by name or path.
        folder: of the cache.
        device: where networks run; None chooses.
        processes: those that share the work.
        prediction_type: of the teacher, where its own files say it wrongly; for image-free runs.

    Raises:
        InputError: as those two.
    """
    config.check()
    processes = processes or Processes()
    teacher = teacher if isinstance(teacher, Teacher) else Teacher(teacher)
    plan = plan_cache(config, teacher, folder, processes, prediction_type)
    return plan.fill(choose_device(device), processes)


def open_data(config: DataConfig, teacher: Teacher, hashes: FileHashes, prediction_type: str) -> Data:
    """List the data; nothing is decoded yet.

    Raises:
        InputError: it cannot be used.
    """
    if config.is_image_free:
        return Prompts(config, teacher, prediction_type)
    return Shipped(teacher) if config.path == EMOJI else Images(config, teacher, hashes)


def write_skipped(path: PathLike, skipped: Sequence[tuple[str, str]]) -> None:
    """Write `skipped.json`, the list of [name, reason]; a file that says it already is left alone."""
    text = json.dumps([list(entry) for entry in skipped], indent=1) + "\n"
    file = Path(path)
    if file.is_file() and file.read_bytes() == text.encode():
        return
    with atomic_write(file) as temporary:
        temporary.write_bytes(text.encode())


def _hash_contents(shards: Shards) -> str:
    """However many things are in one shard."""
    return hash_json({name: value for name, value in shards.identity.items() if name != "each"})
