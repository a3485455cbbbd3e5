"""The benchmark: the teacher under every solver beside the students, in one table, like the paper's Table 1."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcm_core.files import atomic_write
from lcm_core.loading import Model
from lcm_core.painting import Inputs, noise_source, paint
from lcm_core.sampling import NoiseSampler
from lcm_core.settings import Settings
from lcm_core.weights import read_safetensors
from trainer.emoji.data import SHIPPED, Drawing, number_emoji, read_entries
from trainer.emoji.features import FeatureNetwork, extract, load_features
from trainer.metrics import frechet_distance, recall, retrieval_accuracy

BATCH_SIZE = 128


def paint_captions(
    model: Model,
    captions: list[str],
    seeds: list[int],
    sampler: str,
    steps: int,
    guidance_scale: float,
    change_noise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Pictures (B, 3, S, S) uint8 on the CPU, by the same way that users' pictures take.

    `change_noise` puts other noise in the place of the first, (B, C, h, w).
    """
    size = model.resolution
    settings = Settings(
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        gamma=model.gamma,
        width=size,
        height=size,
    )
    cond, uncond = model.encode(captions, size, size), model.encode([""] * len(captions), size, size)
    plain = noise_source(seeds, model.device)

    def noise(shape: Sequence[int]) -> tuple[Tensor, NoiseSampler]:
        first, later = plain(shape)
        return (first if change_noise is None else change_noise(first)), later

    pixels = paint(model, Inputs(cond, uncond, noise), settings)
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    sampler: str
    steps: int
    guidance_scale: float
    fd: float
    recall: float
    alignment: float
    held_out_alignment: float
    seen_alignment: float
    images_per_second: float


class Benchmark:
    """Scores models on the drawings' own captions.

    `samples` captions are drawn from all drawings, seen and held out, and painted with seeds 0, 1, 2, ...

    Args:
        entries: what the N drawings show.
        real: the drawings' features (N, D).
        features: the network that they come from.
    """

    def __init__(self, entries: list[Drawing], real: Tensor, features: FeatureNetwork, samples: int = 2048) -> None:
        self.entries, self.features = entries, features
        self.real, self.codes = real, number_emoji(entries)
        generator = torch.Generator().manual_seed(1234)
        rounds = 1 + samples // len(self.codes)
        order = torch.cat([torch.randperm(len(self.codes), generator=generator) for _ in range(rounds)])
        self.chosen = order[:samples]
        self.held_out = torch.tensor([entries[i].held_out for i in self.chosen.tolist()])

    def score(self, name: str, model: Model, sampler: str, steps: int, guidance_scale: float) -> Row:
        """Paint and measure one line of the table."""
        started = time.monotonic()
        generated = self._paint(model, sampler, steps, guidance_scale)
        speed = len(generated) / (time.monotonic() - started)
        return Row(
            model=name,
            sampler=sampler,
            steps=steps,
            guidance_scale=guidance_scale,
            fd=frechet_distance(self.real, generated),
            recall=recall(self.real, generated),
            alignment=self._retrieve(generated, torch.ones_like(self.held_out)),
            held_out_alignment=self._retrieve(generated, self.held_out),
            seen_alignment=self._retrieve(generated, ~self.held_out),
            images_per_second=speed,
        )

    def _retrieve(self, generated: Tensor, which: Tensor) -> float:
        """Retrieval accuracy of those pictures that `which` marks, (M,) bool."""
        return retrieval_accuracy(generated[which], self.codes[self.chosen[which]], self.real, self.codes)

    def _paint(self, model: Model, sampler: str, steps: int, guidance_scale: float) -> Tensor:
        """Features of one picture for each chosen caption, (M, 128)."""
        parts = []
        for seeds in torch.arange(len(self.chosen)).split(BATCH_SIZE):
            captions = [self.entries[i].plain_caption for i in self.chosen[seeds].tolist()]
            pictures = paint_captions(model, captions, seeds.tolist(), sampler, steps, guidance_scale)
            parts.append(extract(self.features, pictures))
        return torch.cat(parts)


def load_benchmark(samples: int = 2048, folder: Path = SHIPPED) -> Benchmark:
    """The benchmark as shipped: no icons have to be rendered, no network trained.

    Raises:
        InputError: the folder lacks a file of it.
    """
    real = read_safetensors(folder / "drawings.safetensors")[0]["features"].float()
    network = load_features(folder / "features.safetensors")
    return Benchmark(read_entries(folder / "drawings.json"), real, network, samples)


@dataclass
class Ledger:
    """The table's lines in a file: each is measured once, and an interrupted table goes on where it stopped."""

    path: Path
    benchmark: Benchmark
    models: dict[str, Model]

    @property
    def rows(self) -> list[Row]:
        return [Row(**line) for line in json.loads(self.path.read_text())] if self.path.exists() else []

    def row(self, model: str, sampler: str, steps: int, guidance_scale: float) -> Row:
        """The line of this model and sampler, from the file, or measured now."""
        rows = self.rows
        for row in rows:
            if (row.model, row.sampler, row.steps, row.guidance_scale) == (model, sampler, steps, guidance_scale):
                return row
        measured = self.benchmark.score(model, self.models[model], sampler, steps, guidance_scale)
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps([asdict(row) for row in [*rows, measured]], indent=1))
        return measured
