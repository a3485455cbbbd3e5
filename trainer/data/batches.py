"""Batches of latents and text embeddings from the shards of a cache."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks.conditioning import nest, pad_alike, stack_rows
from trainer.data.encode import LATENTS, NUMBERS, SKIPPED, TIME_IDS, TIME_IDS_NAME
from trainer.data.items import Skipped

if TYPE_CHECKING:
    from trainer.data.cache import CachePlan

_OPEN_SHARDS = 64


@dataclass(frozen=True)
class Batch:
    """Samples of one size, all on the CPU in float32.

    Attributes:
        latents: (B, C, h, w), scaled as the U-Net wants.
        conditioning: as `Model.encode` gives it, of Stable Diffusion `encoder_hidden_states` (B, L, D); for SDXL also
            `added_cond_kwargs` with `text_embeds` (B, P) and `time_ids` (B, 6) of each picture's size and crop.
        null_conditioning: the same for the empty prompt; None where nobody asks for it.
    """

    latents: Tensor
    conditioning: dict[str, Any]
    null_conditioning: dict[str, Any] | None


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

    def __init__(self, plan: CachePlan) -> None:
        self.captions, self.latent_channels = plan.captions, plan.teacher.latent_channels
        self._latents, self._texts, self._zero_null = plan.latents, plan.texts, plan.config.null_prompt == "zeros"
        self._table: dict[str, list[tuple[int, int]]] = {}  # bucket -> (rows before a shard, shard)
        self.buckets: dict[str, int] = {}
        self._enlarged: set[int] = set()
        self.skipped = [*plan.data.skipped, *self._scan()]
        if not self.buckets:
            raise InputError(f"none of {len(self.skipped)} pictures can be used (first: {': '.join(self.skipped[0])})")
        numbers = {caption: number for number, caption in enumerate(self.captions)}
        self._caption_of = torch.tensor([numbers[caption] for caption in plan.data.captions])
        self.notes = _notes(plan.data.captions, self.skipped, len(self._enlarged))
        self._open = lru_cache(_OPEN_SHARDS)(lambda path: read_safetensors(path)[0])

    def __len__(self) -> int:
        """Pictures, all variants counted."""
        return sum(self.buckets.values())

    def batch(self, size: int, generator: torch.Generator, caption_dropout: float = 0.0) -> Batch:
        """Draw a batch, and read it."""
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
        cond, null = pad_alike(self._conditioning(texts, time_ids), self._conditioning([0] * len(picks), time_ids))
        return Batch(
            latents=torch.stack([row[0] for row in found]),
            conditioning=cond,
            null_conditioning=_zeros(null) if self._zero_null else null,
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
                    original, target = tensors[TIME_IDS + bucket][:, :2], tensors[TIME_IDS + bucket][:, 4:]
                    small = (original < target).any(1)  # what is cropped to the target's shape must be enlarged
                    self._enlarged.update(tensors[NUMBERS + bucket][small].tolist())
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
        flat = stack_rows([{name: _wide(tensor[row]) for name, tensor in tensors.items()} for tensors, row in rows])
        if "added_cond_kwargs.text_embeds" in flat:
            flat[TIME_IDS_NAME] = time_ids
        return nest(flat)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _zeros(conditioning: Mapping[str, Any]) -> dict[str, Any]:
    """The same with text embeddings of zeros; what SDXL is told of the picture stays."""
    return {
        name: _zeros(value)
        if isinstance(value, dict)
        else torch.zeros_like(value)
        if value.is_floating_point() and name != "time_ids"
        else value
        for name, value in conditioning.items()
    }


def _notes(captions: list[str], skipped: Skipped, enlarged: int) -> list[str]:
    notes = []
    if enlarged:
        notes.append(
            f"{enlarged} of {len(captions)} pictures are smaller than what is trained on and are enlarged, which the "
            "student learns too; give larger ones, or a smaller --resolution"
        )
    if without := captions.count(""):
        notes.append(
            f"{without} of {len(captions)} pictures have no caption and are learnt with the empty prompt; "
            "put captions into cat.txt beside cat.jpg, or into metadata.jsonl"
        )
    if skipped:
        name, reason = skipped[0]
        notes.append(f"{len(skipped)} skipped (first: {name}: {reason}); skipped.json names all")
    return notes
