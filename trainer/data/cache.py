"""The cache of latents and text embeddings: `prepare` makes what is missing, `LatentCache` reads batches from it.

A cache folder holds `latents-<hash>/000000.safetensors` ..., `text-<hash>/000000.safetensors` ... and `files.json`, the
hashes of the data's files. The hashes in the names are of everything that the contents depend on (`about.json` lists
it), so what was made with another VAE, caption or setting is another folder, never mixed and never overwritten. The
data's files are read for their hashes once; later their size and time of change stand for them. Each shard appears
under its name when it is whole, and one that is missing, or not bit by bit what was written, is made again; it is read
for this when its size or time of change is not the one of the last time (`checked.json`).

Of pictures in a store, each tar is a shard, see `trainer.data.streams`. A finished cache can stand for the pictures as
data. Then its index alone is opened, however many pictures it holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
from lcm_core.files.safetensors import PathLike
from lcm_core.networks.device import choose_device
from trainer.data.batches import Batch, LatentCache, Pick
from trainer.data.encode import Data, Images, text_maker
from trainer.data.fill import fill
from trainer.data.finished import FinishedCache
from trainer.data.hashing import FileHashes, hash_json
from trainer.data.index import find_index, index_path, write_index
from trainer.data.labels import column_of
from trainer.data.paint import Prompts, Shipped
from trainer.data.pictures import Encoder
from trainer.data.remote import RemoteTar, find_remote, is_remote
from trainer.data.settings import DataConfig
from trainer.data.shards import FORMAT, Contents, Shards, is_unchanged, known_whole, remember_whole
from trainer.data.streams import Streamed, streaming
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
class StreamedPlan:
    """A cache of pictures in a store, of which nothing but names, sizes and versions of its tars is known yet."""

    config: DataConfig
    teacher: Teacher
    tars: Sequence[RemoteTar]
    latents: Shards

    @property
    def captions(self) -> list[str]:
        """Every distinct one, once the tars were read."""
        return _distinct(Streamed(self.latents).captions)

    def hash_pictures(self) -> str:
        """A hash of all that the latents depend on."""
        return _hash_contents(self.latents)

    def hash_captions(self) -> str:
        """A hash of all that the text embeddings depend on; captions are in the tars."""
        return hash_json([self.hash_pictures(), self.teacher.hash_text(), write_versions([""], self.config)])

    def fill(self, device: torch.device, processes: Processes) -> LatentCache:
        """Read the tars that were not read before, each process its own, and go on as with pictures that are here.

        Raises:
            InputError: as `CachePlan.fill`; or a connection broke too often, or the tars have no labels.
        """
        if processes.is_main:
            self.latents.begin()
        processes.wait()
        fill(self.latents, lambda: streaming(self.tars, self.config, self.teacher, device), processes, "tars")
        processes.wait()
        self.latents.check()
        if processes.is_main:
            remember_whole(self.latents.folder)
        processes.wait()
        data = Streamed(self.latents)
        if self.config.labels and not any(data.captions):
            raise InputError(f"data {self.config.path} has no labels {self.config.labels!r}; name those that it has")
        captions = _distinct(data.captions)
        texts = _texts(self.config, self.teacher, captions, self.latents.folder.parent)
        if not processes.is_main:
            processes.wait()  # as in `plan_cache`
        return CachePlan(self.config, self.teacher, data, captions, self.latents, texts).fill(device, processes)


Plan = CachePlan | StreamedPlan | FinishedCache
"""What a run is told of its cache before it fills it."""


def plan_cache(
    config: DataConfig, teacher: Teacher, folder: Path, processes: Processes, prediction_type: str = ""
) -> Plan:
    """Find out what a cache is made of. The data's files are read for their hashes, if that was not done before; of
    those in a store nothing is read.

    Args:
        config: the data.
        teacher: whose VAE and text encoders are used.
        folder: of the cache; of several processes, all must see the same.
        processes: the processes that share the work.
        prediction_type: of the teacher, where its own files say it wrongly; for image-free runs.

    Raises:
        InputError: data or teacher that cannot be used.
    """
    if is_remote(config.path):
        return _plan_streams(config, teacher, folder)
    if config.path and (index := find_index(Path(config.path))) is not None:
        return FinishedCache(config, teacher, index)
    data = open_data(config, teacher, FileHashes(folder / "files.json"), prediction_type)
    if not processes.is_main:
        processes.wait()  # until the first process has hashed the files, which then need not be read again
    identity = {"latents": data.identity(), "format": FORMAT}
    captions = _distinct(data.captions)
    each = 1 if config.is_image_free else config.variant_count  # pictures from one picture of the data
    shard = max(1, config.shard_size // each)
    latents = Shards(folder / "latents", identity, len(data.captions), shard, data.contents())
    return CachePlan(config, teacher, data, captions, latents, _texts(config, teacher, captions, folder))


def _plan_streams(config: DataConfig, teacher: Teacher, folder: Path) -> StreamedPlan:
    encoder, tars = Encoder(config, teacher), find_remote(config.path)
    made_by = encoder.made_by() | encoder.kept_beside() | {"labels": column_of(config.labels, teacher.labels)}
    about = {"latents": made_by, "format": FORMAT}
    identities = [tar.identity for tar in tars]
    identity = {**about, "tars": hash_json(identities)}
    latents = Shards(folder / "latents", identity, len(tars), 1, Contents(about, lambda: identities))
    latents.starts = ()
    return StreamedPlan(config, teacher, tars, latents)


def _distinct(captions: Sequence[str]) -> list[str]:
    """Each once, the empty one first."""
    return list(dict.fromkeys(["", *captions]))


def _texts(config: DataConfig, teacher: Teacher, captions: Sequence[str], folder: Path) -> Shards:
    """The shards of the text embeddings of captions, in all their versions."""
    written = write_versions(captions, config)
    about = {"text": teacher.hash_text(), "format": FORMAT}
    identity = {"captions": hash_json(written), **about}
    return Shards(folder / "text", identity, len(written), config.shard_size, Contents(about, lambda: written))


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
