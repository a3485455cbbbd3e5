"""Batches of latents and text embeddings from the shards of a cache."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks.conditioning import nest, pad_alike, stack_rows
from trainer.data.encode import TIME_IDS_NAME
from trainer.data.index import HELD, ROWS, read_index
from trainer.data.items import Skipped
from trainer.data.rows import (
    CHECKSUMS,
    HINTS,
    LATENTS,
    NO_TOKENS,
    TEXT_CHECKSUMS,
    TIME_IDS,
    TOKENS,
    picture_names,
    row_checksum,
)

HINT, PICTURE_TOKENS = "hint", "picture_tokens"
"""Parts of the conditioning: control pictures (B, 3, H, W) in [0, 1]; and under the name "0" what an IP-Adapter sees,
(B, T, D), in the null conditioning what it sees in no picture."""
_OPEN_SHARDS = 64
_FEW = 1 << 16  # of so many rows a whole permutation is drawn in half a millisecond


@dataclass(frozen=True)
class Batch:
    """Samples of one size, all on the CPU in float32.

    Attributes:
        latents: (B, C, h, w), scaled as the U-Net wants.
        conditioning: as `Model.encode` gives it, of Stable Diffusion `encoder_hidden_states` (B, L, D); for SDXL also
            `added_cond_kwargs` with `text_embeds` (B, P) and `time_ids` (B, 6) of each picture's size and crop; and
            `hint` or `picture_tokens` where it was made for a control.
        null_conditioning: the same for the empty prompt; None where nobody asks for it.
    """

    latents: Tensor
    conditioning: dict[str, Any]
    null_conditioning: dict[str, Any] | None


class Pick(NamedTuple):
    """One sample of a batch: which row of which bucket, whether its caption is dropped, and which version of the
    caption it has."""

    bucket: str
    row: int
    dropped: bool
    version: int = 0


class _Row(NamedTuple):
    """What the cache holds of a picture."""

    latents: Tensor
    """(C, h, w)."""
    text: int
    """Number of the caption's first version."""
    time_ids: Tensor
    """(6,)."""
    beside: dict[str, Tensor]
    """What a control looks at, by the names in `trainer.data.rows`."""


class LatentCache:
    """Latents and text embeddings on disk, mapped into memory, never read all at once.

    What a row holds is compared with its checksum when it is read, so that no damage is trained on.

    Args:
        file: the cache's index.
        zero_null: the empty prompt is all zeros instead of its embedding.
        checked: see `read_index`.

    Attributes:
        examples: a few captions from all over the data.
        caption_count: distinct captions that are not empty.
        skipped: (name, reason) of everything that could not be used.
        notes: what the user should know about the data, one line each.
        latent_channels: C of the latents.
        buckets: "HxW" of the latents -> pictures of that size to learn from, all variants and repeats counted.

    Raises:
        InputError: the index cannot be read.
    """

    def __init__(self, file: Path, zero_null: bool = False, checked: bool = False) -> None:
        self._folder, self._zero_null = file.parent, zero_null
        self._tables, self.about = read_index(file, checked)
        self.examples: list[str] = self.about["examples"]
        self.caption_count: int = self.about["captions"]
        self.skipped: Skipped = [(name, reason) for name, reason in self.about["skipped"]]
        self.notes: list[str] = self.about["notes"]
        self.latent_channels: int = self.about["latent_channels"]
        self.buckets = {n.removeprefix(ROWS): len(t) for n, t in sorted(self._tables.items()) if n.startswith(ROWS)}
        self._open = lru_cache(_OPEN_SHARDS)(lambda path: read_safetensors(path)[0])

    def __len__(self) -> int:
        """Pictures, all variants and repeats counted."""
        return sum(self.buckets.values())

    @property
    def guide(self) -> str:
        """What the pictures have for a control to look at, `HINT` or `PICTURE_TOKENS`; empty for nothing."""
        shard = next(int(table[0][0]) for name, table in self._tables.items() if name.startswith(ROWS))
        names = self._open(self._folder / f"{shard:06d}.safetensors")
        kinds = {HINTS: HINT, TOKENS: PICTURE_TOKENS}
        return next((kind for start, kind in kinds.items() if any(name.startswith(start) for name in names)), "")

    def batch(self, size: int, generator: torch.Generator, caption_dropout: float = 0.0) -> Batch:
        """Draw a batch, and read it."""
        return self.read(self.draw(size, generator, caption_dropout))

    def draw(self, size: int, generator: torch.Generator, caption_dropout: float = 0.0) -> list[Pick]:
        """Choose the samples of one batch, all from one bucket, which is drawn in proportion to its pictures.

        No row comes twice unless the bucket has fewer than `size`. Processes that share a batch draw all of it with
        equal generators, and `read` each its own part. Time and memory do not grow with the number of pictures.

        Args:
            size: samples of the batch.
            generator: on the CPU; the choice depends on it alone.
            caption_dropout: share of captions that the empty prompt replaces.
        """
        number = int(torch.randint(len(self), (), generator=generator))
        edges = list(accumulate(self.buckets.values()))
        bucket = list(self.buckets)[bisect_right(edges, number)]
        rows = _distinct(self.buckets[bucket], size, generator)
        dropped = (torch.rand(size, generator=generator) < caption_dropout).tolist()
        versions = [0] * size
        if (count := self.about["versions"]) > 1:
            versions = torch.randint(count, (size,), generator=generator).tolist()
        return [Pick(bucket, *pick) for pick in zip(rows, dropped, versions, strict=True)]

    def held_out(self, size: int) -> Iterator[list[Pick]]:
        """The pictures that are kept out of the training, in batches of at most `size`, always the same."""
        for name, table in sorted(self._tables.items()):
            if name.startswith(HELD):
                for start in range(0, len(table), size):
                    yield [Pick(name, row, False) for row in range(start, min(start + size, len(table)))]

    def read(self, picks: Sequence[Pick]) -> Batch:
        """Fetch samples of one `draw`.

        Raises:
            InputError: a shard has gone since `prepare`, or is damaged.
        """
        found = [self._row(pick) for pick in picks]
        time_ids = torch.stack([row.time_ids for row in found]).float()
        texts = [0 if pick.dropped else row.text + pick.version for pick, row in zip(picks, found, strict=True)]
        cond, null = pad_alike(self._conditioning(texts, time_ids), self._conditioning([0] * len(picks), time_ids))
        beside = [row.beside for row in found]
        return Batch(
            latents=torch.stack([row.latents for row in found]).float(),
            conditioning={**cond, **_guides(beside, TOKENS)},
            null_conditioning={**(_zeros(null) if self._zero_null else null), **_guides(beside, NO_TOKENS)},
        )

    def _row(self, pick: Pick) -> _Row:
        table = pick.bucket if pick.bucket.startswith(HELD) else ROWS + pick.bucket
        shard, row, text = self._tables[table][pick.row].tolist()
        size = pick.bucket.removeprefix(HELD)
        path = self._folder / f"{shard:06d}.safetensors"
        tensors = self._open(path)
        names = picture_names(tensors, size)
        held = dict(zip(names, _checked(path, tensors, CHECKSUMS + size, row, names), strict=True))
        beside = {name.removesuffix(size): value for name, value in held.items()}
        return _Row(beside.pop(LATENTS), text, tensors[TIME_IDS + size][row], beside)

    def _conditioning(self, texts: Sequence[int], time_ids: Tensor) -> dict[str, Any]:
        rows = {text: self._text(text) for text in set(texts)}
        flat = stack_rows([rows[text] for text in texts])
        if "added_cond_kwargs.text_embeds" in flat:
            flat[TIME_IDS_NAME] = time_ids
        return nest(flat)

    def _text(self, number: int) -> dict[str, Tensor]:
        shard, row = divmod(number, self.about["texts_each"])
        path = self._folder.parent / self.about["texts"] / f"{shard:06d}.safetensors"
        tensors = self._open(path)
        names = sorted(tensors.keys() - {TEXT_CHECKSUMS})
        return dict(zip(names, map(_wide, _checked(path, tensors, TEXT_CHECKSUMS, row, names)), strict=True))


def _distinct(count: int, size: int, generator: torch.Generator) -> list[int]:
    """`size` numbers below `count`; none twice, or where there are fewer, all about equally often."""
    if count <= max(4 * size, _FEW):
        rounds = [torch.randperm(count, generator=generator) for _ in range(-(-size // count))]
        return torch.cat(rounds)[:size].tolist()
    found: dict[int, None] = {}
    while len(found) < size:  # twice at most, nearly always
        found |= dict.fromkeys(torch.randint(count, (size,), generator=generator).tolist())
    return list(found)[:size]


def _checked(path: Path, tensors: Mapping[str, Tensor], sums: str, row: int, names: Sequence[str]) -> list[Tensor]:
    """One row of some tensors of a shard.

    Raises:
        InputError: it is not what was written.
    """
    try:
        rows = [tensors[name][row] for name in names]
        if row_checksum(rows) == int(tensors[sums][row]):
            return rows
    except (KeyError, IndexError):
        pass
    raise InputError(f"{path} is damaged; delete it, and the command that made the cache makes it again")


def _guides(rows: Sequence[Mapping[str, Tensor]], tokens: str) -> dict[str, Any]:
    """What a control looks at, as the networks are given it; `tokens` names those of the pictures, or of none."""
    if HINTS in rows[0]:
        return {HINT: torch.stack([row[HINTS] for row in rows]).float() / 255}
    return {PICTURE_TOKENS: {"0": torch.stack([row[tokens] for row in rows]).float()}} if tokens in rows[0] else {}


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
