"""The embedded benchmark: captions of real drawings, seen and held out, and the network that compares pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lcm_core.files.safetensors import read_safetensors
from trainer.recipes.emoji.data import SHIPPED, Drawing, number_emoji, read_entries
from trainer.recipes.emoji.features import FeatureNetwork, load_features

FIRST_FILE = "features-first.safetensors"


class Benchmark:
    """What models are asked to paint, and the drawings that their pictures are compared with.

    `samples` captions are drawn from all drawings, seen and held out; `chosen` holds their numbers.

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


def load_benchmark(samples: int = 2048, folder: Path = SHIPPED, first: bool = False) -> Benchmark:
    """The benchmark as shipped: no icons have to be rendered, no network trained.

    Args:
        samples: how many pictures are asked for.
        folder: of a model's benchmark.
        first: measure with the first benchmark's network, which sees 64 pixels, to compare with its numbers.

    Raises:
        InputError: the folder lacks a file of it.
    """
    tensors, _ = read_safetensors(folder / "drawings.safetensors")
    network = load_features(folder / (FIRST_FILE if first else "features.safetensors"))
    real = tensors["features_first" if first else "features"].float()
    return Benchmark(read_entries(folder / "drawings.json"), real, network, samples)


def load_first_features() -> FeatureNetwork:
    """The first benchmark's network, from the model that is shipped now."""
    path = SHIPPED / FIRST_FILE
    return load_features(path if path.exists() else SHIPPED / "features.safetensors")
