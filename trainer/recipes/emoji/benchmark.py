"""The embedded benchmark: captions of real drawings, seen and held out, and the network that compares pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lcm_core.files.safetensors import read_safetensors
from trainer.recipes.emoji.data import SHIPPED, Drawing, number_emoji, read_entries
from trainer.recipes.emoji.features import FeatureNetwork, load_features


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


def load_benchmark(samples: int = 2048, folder: Path = SHIPPED) -> Benchmark:
    """The benchmark as shipped: no icons have to be rendered, no network trained.

    Raises:
        InputError: the folder lacks a file of it.
    """
    real = read_safetensors(folder / "drawings.safetensors")[0]["features"].float()
    network = load_features(folder / "features.safetensors")
    return Benchmark(read_entries(folder / "drawings.json"), real, network, samples)
