"""The cache of latents and text embeddings: `prepare` makes what is missing, `LatentCache` reads batches from it.

A cache folder holds `latents-<hash>/000000.safetensors` ..., `text-<hash>/000000.safetensors` ... and `files.json`, the
hashes of the data's files. The hashes in the names are of everything that the contents depend on (`about.json` lists
it), so what was made with another VAE, caption or setting is another folder, never mixed and never overwritten. The
data's files are read for their hashes once; later their size and time of change stand for them. Each shard appears
under its name when it is whole, and one that is missing or cut short is made again.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
from lcm_core.files.safetensors import PathLike, read_safetensors
from lcm_core.networks.device import choose_device
from trainer.data.encode import HIDDEN, LATENTS, NUMBERS, POOLED, SKIPPED, TIME_IDS, Data, Images, text_maker
from trainer.data.hashing import FileHashes, hash_json
from trainer.data.items import Skipped
from trainer.data.paint import Prompts, Shipped
from trainer.data.settings import DataConfig
from trainer.data.shards import Shards, fill
from trainer.data.teacher import Teacher
from trainer.distributed import Processes

FORMAT = 1
"""Part of every hash; to be raised when the contents of shards change their meaning."""
EMOJI = "emoji"
"""`DataConfig.path` that stands for the shipped drawings."""
_OPEN_SHARDS = 64


@dataclass(frozen=True)
class Batch:
    """Samples of one size, all on the CPU in float32.

    Attributes:
        latents: (B, C, h, w), scaled as the U-Net wants.
        conditioning: as `lcm_core.pipeline.model.Model.encode` gives it: `encoder_hidden_states` (B, L, D); for SDXL also
            `added_cond_kwargs` with `text_embeds` (B, P) and `time_ids` (B, 6) of each picture's size and crop.
        null_conditioning: the same for the empty prompt.
    """

    latents: Tensor
    conditioning: dict[str, Any]
    null_conditioning: dict[str, Any]


class Pick(NamedTuple):
    """One sample of a batch: which row of which bucket, and whether its caption is dropped."""

    bucket: str
    row: int
    dropped: bool


class LatentCache:
    """Latents and text embeddings on disk, mapped into memory, never read all at once. Made by `prepare`.

    Attributes:
        captions: every distinct caption; the first is empty.
        skipped: (name, reason) of everything that could not be used.
        notes: what the user should know about the data, one line each.
        latent_channels: C of the latents.
        buckets: "HxW" of the latents -> pictures of that size, all variants counted.

    Raises:
        InputError: a shard is missing, or there is no picture at all.
    """

    def __init__(
        self, latents: Shards, texts: Shards, data: Data, captions: Sequence[str], latent_channels: int
    ) -> None:
        self.captions, self.latent_channels = list(captions), latent_channels
        self._latents, self._texts = latents, texts
        self._table: dict[str, list[tuple[int, int]]] = {}  # bucket -> (rows before a shard, shard)
        self.buckets: dict[str, int] = {}
        self.skipped = [*data.skipped, *self._scan()]
        if not self.buckets:
            raise InputError(f"none of {len(self.skipped)} pictures can be used (first: {': '.join(self.skipped[0])})")
        numbers = {caption: number for number, caption in enumerate(captions)}
        self._caption_of = torch.tensor([numbers[caption] for caption in data.captions])
        self.notes = _notes(data.captions, self.skipped)
        self._open = lru_cache(_OPEN_SHARDS)(lambda path: read_safetensors(path)[0])

    def __len__(self) -> int:
        """Pictures, all variants counted."""
        return sum(self.buckets.values())

    def batch(self, size: int, generator: torch.Generator, caption_dropout: float = 0.0) -> Batch:
        """`draw` and `read`."""
        return self.read(self.draw(size, generator, caption_dropout))

    def draw(self, size: int, generator: torch.Generator, caption_dropout: float = 0.0) -> list[Pick]:
        """Choose the samples of one batch, all from one bucket, which is drawn in proportion to its pictures.

        No picture comes twice unless the bucket has fewer than `size`. Processes that share a batch draw all of it with
        equal generators, and `read` each its own part.

        Args:
            size: samples of the batch.
            generator: on the CPU; the choice depends on it alone.
            caption_dropout: share of captions that the empty prompt replaces.
        """
        number = int(torch.randint(len(self), (), generator=generator))
        edges = list(accumulate(self.buckets.values()))
        bucket = list(self.buckets)[bisect_right(edges, number)]
        count = self.buckets[bucket]
        rounds = [torch.randperm(count, generator=generator) for _ in range(-(-size // count))]
        dropped = torch.rand(size, generator=generator) < caption_dropout
        rows = torch.cat(rounds)[:size]
        return [Pick(bucket, row, drop) for row, drop in zip(rows.tolist(), dropped.tolist(), strict=True)]

    def read(self, picks: Sequence[Pick]) -> Batch:
        """Fetch samples of one `draw`.

        Raises:
            InputError: a shard has gone since `prepare`.
        """
        found = [self._row(pick) for pick in picks]
        time_ids = torch.stack([row[2] for row in found]).float()
        texts = [0 if pick.dropped else int(self._caption_of[row[1]]) for pick, row in zip(picks, found, strict=True)]
        return Batch(
            latents=torch.stack([row[0] for row in found]),
            conditioning=self._conditioning(texts, time_ids),
            null_conditioning=self._conditioning([0] * len(picks), time_ids),
        )

    def _scan(self) -> Skipped:
        """Count the rows of each bucket in the shards. Returns what these say is skipped."""
        skipped: Skipped = []
        for shard in range(len(self._latents)):
            tensors = read_safetensors(self._latents.path(shard))[0]
            skipped += [(name, reason) for name, reason in json.loads(bytes(tensors[SKIPPED].tolist()))]
            for name, tensor in sorted(tensors.items()):
                if name.startswith(LATENTS):
                    bucket = name.removeprefix(LATENTS)
                    before = self.buckets.get(bucket, 0)
                    self._table.setdefault(bucket, []).append((before, shard))
                    self.buckets[bucket] = before + len(tensor)
        # the order decides what a seed draws, and must not depend on how many pictures a shard holds
        self.buckets = dict(sorted(self.buckets.items()))
        return skipped

    def _row(self, pick: Pick) -> tuple[Tensor, int, Tensor]:
        """Latents (C, h, w), the number of the picture, and time_ids (6,)."""
        table = self._table[pick.bucket]
        before, shard = table[bisect_right(table, pick.row, key=lambda entry: entry[0]) - 1]
        tensors, row = self._open(self._latents.path(shard)), pick.row - before
        latents, numbers, time_ids = (tensors[kind + pick.bucket] for kind in (LATENTS, NUMBERS, TIME_IDS))
        return latents[row], int(numbers[row]), time_ids[row]

    def _conditioning(self, texts: Sequence[int], time_ids: Tensor) -> dict[str, Any]:
        rows = [(self._open(self._texts.path(text // self._texts.each)), text % self._texts.each) for text in texts]
        conditioning: dict[str, Any] = {"encoder_hidden_states": _stack(rows, HIDDEN)}
        if POOLED in rows[0][0]:
            conditioning["added_cond_kwargs"] = {"text_embeds": _stack(rows, POOLED), "time_ids": time_ids}
        return conditioning


def _stack(rows: Sequence[tuple[Mapping[str, Tensor], int]], name: str) -> Tensor:
    return torch.stack([tensors[name][row] for tensors, row in rows]).float()


def _notes(captions: list[str], skipped: Skipped) -> list[str]:
    notes = []
    if without := captions.count(""):
        notes.append(
            f"{without} of {len(captions)} pictures have no caption and are learnt with the empty prompt; "
            "put captions into cat.txt beside cat.jpg, or into metadata.jsonl"
        )
    if skipped:
        name, reason = skipped[0]
        notes.append(f"{len(skipped)} skipped (first: {name}: {reason}); skipped.json names all")
    return notes


def prepare(
    config: DataConfig,
    teacher: PathLike,
    folder: Path,
    device: str | torch.device | None = None,
    processes: Processes | None = None,
    tokenizer: str = "",
    prediction_type: str = "",
) -> LatentCache:
    """Compute what is missing of the cache in `folder`, then open it.

    VAE, text encoders and, for an image-free run, the teacher's U-Net are loaded only where something of theirs is
    missing, and released again. Of several processes, each makes every n-th shard; all must see the same folder.

    Args:
        config: the data.
        teacher: the model whose VAE and text encoders are used, by name or path.
        folder: of the cache.
        device: where networks run; None chooses.
        processes: those that share the work.
        tokenizer: folder with CLIP's words, for a single file that has none beside it.
        prediction_type: of the teacher, where its own files say it wrongly; for image-free runs.

    Raises:
        InputError: data or teacher that cannot be used, a folder that cannot be written, a full disk.
    """
    config.check()
    team, place = processes or Processes(), choose_device(device)
    school = Teacher(teacher, tokenizer or None)
    data = _open_data(config, school, FileHashes(folder / "files.json"), prediction_type)
    if not team.is_main:
        team.wait()  # until the first process has hashed the files, which then need not be read again
    identity = {"latents": data.identity(), "format": FORMAT}
    captions = list(dict.fromkeys(["", *data.captions]))
    text_identity = {"captions": hash_json(captions), "text": school.hash_text(), "format": FORMAT}
    each = 1 if config.is_image_free else config.variant_count  # pictures from one picture of the data
    latents = Shards(folder / "latents", identity, len(data.captions), max(1, config.shard_size // each))
    texts = Shards(folder / "text", text_identity, len(captions), config.shard_size)
    if team.is_main:
        latents.begin()
        texts.begin()
        team.wait()
    fill(latents, lambda: data.load(place), team, "pictures")
    fill(texts, lambda: text_maker(captions, school, place), team, "captions")
    team.wait()
    latents.check()
    texts.check()
    cache = LatentCache(latents, texts, data, captions, school.latent_channels)
    if team.is_main:
        write_skipped(latents.folder / "skipped.json", cache.skipped)
    return cache


def _open_data(config: DataConfig, teacher: Teacher, hashes: FileHashes, prediction_type: str) -> Data:
    if config.is_image_free:
        return Prompts(config, teacher, prediction_type)
    return Shipped(teacher) if config.path == EMOJI else Images(config, teacher, hashes)


def write_skipped(path: PathLike, skipped: Sequence[tuple[str, str]]) -> None:
    """Write `skipped.json`, the list of [name, reason]; a file that says it already is left alone."""
    text = json.dumps([list(entry) for entry in skipped], indent=1) + "\n"
    file = Path(path)
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
