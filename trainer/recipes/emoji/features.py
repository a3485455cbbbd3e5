"""The benchmark's eye: a small network that tells emoji apart, trained on the real drawings alone.

Its features are what Frechet distance, recall and retrieval are computed in. They are not Inception's, so the numbers
compare models of this benchmark with each other and with nothing else. No generated picture and no gradient of a
generative model ever reaches it.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm_core.files.safetensors import read_safetensors, write_safetensors
from trainer.loop import LoopConfig, train
from trainer.recipes.emoji.autoencoder import to_unit
from trainer.recipes.emoji.data import PACKAGES, Drawings, number_emoji

FEATURE_WIDTH = 128


class FeatureNetwork(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> features (B, 128)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 80, 112)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.project = nn.Linear(widths[-1] * 16, FEATURE_WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        # Pooled to 4x4, not 1x1: where a thing stands in the picture belongs to how it looks.
        return self.project(F.adaptive_avg_pool2d(self.body(pixels), 4).flatten(1))


def train_features(drawings: Drawings, config: LoopConfig, folder: Path, device: torch.device) -> FeatureNetwork:
    """Train on all real drawings (the held-out ones too: they are real) to name their emoji and their style."""
    codes = number_emoji(drawings.entries)
    styles = torch.tensor([list(PACKAGES).index(e.style) for e in drawings.entries])
    heads = {"emoji": nn.Linear(FEATURE_WIDTH, int(codes.max()) + 1), "style": nn.Linear(FEATURE_WIDTH, len(PACKAGES))}
    network = nn.ModuleDict({"features": FeatureNetwork(), **heads}).to(device)
    ema = copy.deepcopy(network).requires_grad_(False)

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(codes), (config.batch_size,), generator=generator)
        pixels = disturb(to_unit(drawings.images[chosen]), generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            features = network["features"](pixels)
            emoji, style = network["emoji"](features), network["style"](features)
        loss = F.cross_entropy(emoji.float(), codes[chosen].to(device), label_smoothing=0.1)
        return loss + F.cross_entropy(style.float(), styles[chosen].to(device))

    train(network, loss_fn, config, folder, ema)
    features = ema["features"]
    assert isinstance(features, FeatureNetwork)
    return features


def save_features(path: Path, network: FeatureNetwork) -> None:
    write_safetensors(path, {name: tensor.half() for name, tensor in network.state_dict().items()}, {})


def load_features(path: Path) -> FeatureNetwork:
    network = FeatureNetwork()
    network.load_state_dict(read_safetensors(path)[0])
    return network.eval().requires_grad_(False)


def disturb(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 3 pixels, soften half of them, and add noise and a change of brightness of random strength."""
    down, right = torch.randint(-3, 4, (2,), generator=generator).tolist()
    pixels = pixels.roll((down, right), dims=(-2, -1))
    soft = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
    choice, strength, light = torch.rand(3, len(pixels), 1, 1, 1, generator=generator)
    pixels = torch.where(choice < 0.5, soft, pixels)
    noise = torch.randn(pixels.shape, generator=generator) * strength * 0.2
    return (pixels + noise) * (0.85 + 0.3 * light)


@torch.no_grad()
def extract(network: FeatureNetwork, images: Tensor, batch_size: int = 256) -> Tensor:
    """uint8 pictures (N, 3, S, S) -> features (N, 128), float32 on the CPU."""
    device = next(network.parameters()).device
    return torch.cat([network(to_unit(part).to(device)).float().cpu() for part in images.split(batch_size)])
