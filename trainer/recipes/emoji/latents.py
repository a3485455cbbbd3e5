"""What the generative networks learn from: latents of the drawings and of composed scenes, in several sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.files.safetensors import read_safetensors, write_safetensors
from trainer.data.prefetch import Prefetch
from trainer.recipes.emoji import AnyModule
from trainer.recipes.emoji.autoencoder import SCALING_FACTOR, encode_mean
from trainer.recipes.emoji.data import Drawings
from trainer.recipes.emoji.scenes import Scene, draw_scene, resize
from trainer.recipes.emoji.words import tokenize

SCENES = {64: 30_000, 96: 8_000, 128: 16_000}
"""Pixels -> how many scenes are composed at this size."""
SCENE_SHARE = 0.4
"""Share of the scenes among the samples; the others are single drawings on white."""
BATCH, PART = 128, 8
"""Pictures that are encoded at once, and how many times so many are stored in one file."""


@dataclass(frozen=True)
class CaptionedLatents:
    """Latents of drawings that may be trained on and of scenes made from them, with what is needed to caption them."""

    latents: Mapping[int, Tensor]
    """Pixels -> (N + K, 4, h, w), scaled to spread 1: of the N `chosen` drawings, then of the scenes of that size."""
    chosen: Tensor
    """(N,) numbers in `drawings`."""
    scenes: Mapping[int, list[Scene]]
    """Pixels -> K scenes."""
    drawings: Drawings
    tokenizer: Any

    @property
    def smallest(self) -> int:
        """Pixels of the smallest pictures."""
        return min(self.latents)

    @property
    def largest(self) -> int:
        """Pixels of the largest pictures, which is what the model is for."""
        return max(self.latents)

    def choose_size(self, shares: Mapping[int, float], generator: torch.Generator) -> int:
        """One of the sizes that are here, as often as `shares` says."""
        sizes = list(self.latents)
        weights = torch.tensor([shares[size] for size in sizes])
        return sizes[int(torch.multinomial(weights, 1, generator=generator))]

    def batch(self, count: int, size: int, generator: torch.Generator, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Random latents (B, 4, h, w) of pictures of `size` pixels and their captions' tokens (B, 77), a share
        `dropout` of them empty."""
        scenes = self.scenes[size]
        numbers = torch.randint(len(self.chosen), (count,), generator=generator)
        if scenes:
            composed = torch.rand(count, generator=generator) < SCENE_SHARE
            others = len(self.chosen) + torch.randint(len(scenes), (count,), generator=generator)
            numbers = torch.where(composed, others, numbers)
        kept = torch.rand(count, generator=generator) >= dropout
        captions = [
            self._caption(number, size, generator) if keep else ""
            for number, keep in zip(numbers.tolist(), kept.tolist(), strict=True)
        ]
        return self.latents[size][numbers].float(), tokenize(self.tokenizer, captions)

    def _caption(self, number: int, size: int, generator: torch.Generator) -> str:
        if number < len(self.chosen):
            return self.drawings.entries[self.chosen[number]].caption(generator)
        return self.scenes[size][number - len(self.chosen)].caption(self.drawings.entries, generator)


def encode_pool(
    vae: AnyModule,
    drawings: Drawings,
    chosen: Tensor,
    tokenizer: Any,
    folder: Path,
    device: torch.device,
    effort: float = 1.0,
    workers: int = 0,
) -> CaptionedLatents:
    """Encode drawings, and scenes of them, at each size up to the drawings' own.

    What was encoded before is read from `folder`.

    Args:
        chosen: (N,) numbers of the drawings.
        effort: multiplies the number of scenes; 0 for none.
    """
    latents, scenes = {}, {}
    for size, count in SCENES.items():
        if size <= drawings.images.shape[-1]:
            first = size * 1_000_000  # other scenes at each size
            seeds = range(first, first + math.ceil(count * effort))
            scenes[size] = [draw_scene(drawings.entries, drawings.images, chosen, seed) for seed in seeds]
            parts = _parts(vae, drawings, chosen, scenes[size], size, folder, device, workers)
            latents[size] = torch.cat(list(parts))
    return CaptionedLatents(latents, chosen, scenes, drawings, tokenizer)


def _parts(
    vae: AnyModule,
    drawings: Drawings,
    chosen: Tensor,
    scenes: list[Scene],
    size: int,
    folder: Path,
    device: torch.device,
    workers: int,
) -> Iterator[Tensor]:
    """Latents of the drawings and the scenes in their order, in half precision."""
    numbers = range(len(chosen) + len(scenes))

    def compose(batch: int) -> Tensor:
        return _pictures(drawings, chosen, scenes, size, numbers[batch * BATCH : (batch + 1) * BATCH])

    batches = Prefetch(compose, math.ceil(len(numbers) / BATCH), workers)
    for first in range(0, batches.count, PART):
        path = folder / f"{size}-{first * BATCH}.safetensors"
        if not path.exists():
            part = range(first, min(first + PART, batches.count))
            done = [encode_mean(vae, batches(batch), device).cpu() for batch in part]
            write_safetensors(path, {"latents": (torch.cat(done) * SCALING_FACTOR).half()}, {})
        yield read_safetensors(path)[0]["latents"]


def _pictures(drawings: Drawings, chosen: Tensor, scenes: list[Scene], size: int, numbers: range) -> Tensor:
    """Pictures (B, 3, size, size) in [0, 255], by their numbers: first the drawings, then the scenes."""
    whole = drawings.on_white(chosen[[i for i in numbers if i < len(chosen)]])
    composed = [scenes[i - len(chosen)].picture(drawings.images, size) for i in numbers if i >= len(chosen)]
    return torch.cat([resize(whole.float(), size), *(picture[None] for picture in composed)])
