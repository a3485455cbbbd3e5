"""The benchmark's eye: a small network that tells emoji apart, trained on the real drawings alone.

Its features are what Frechet distance, recall and retrieval are computed in. They are not Inception's, so the numbers
compare models of this benchmark with each other and with nothing else. No generated picture and no gradient of a
generative model ever reaches it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm_core.files.safetensors import read_safetensors, write_safetensors
from trainer.cuda_graphs import graphed
from trainer.data.prefetch import Prefetch
from trainer.loop import LoopConfig, step_generator, train
from trainer.recipes.emoji.autoencoder import to_unit
from trainer.recipes.emoji.compute import autocast, place
from trainer.recipes.emoji.data import Drawings, number_emoji
from trainer.recipes.emoji.icons import SETS
from trainer.recipes.emoji.scenes import resize

FEATURE_WIDTH = 128
FIRST_WIDTHS = (3, 24, 48, 80, 112)
"""Channels of the first benchmark's network, which looks at 64 pixels."""
WIDTHS = (3, 24, 48, 80, 112, 128)
"""Channels for 128 pixels: one stage more."""


class FeatureNetwork(nn.Module):
    """(B, 3, S, S) in [-1, 1] -> features (B, 128), for pictures of one `size` S in pixels."""

    def __init__(self, size: int = 64, widths: Sequence[int] = FIRST_WIDTHS) -> None:
        super().__init__()
        self.size, self.widths = size, widths
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.project = nn.Linear(widths[-1] * 16, FEATURE_WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        # Pooled to 4x4, not 1x1: where a thing stands in the picture belongs to how it looks.
        return self.project(F.adaptive_avg_pool2d(self.body(pixels), 4).flatten(1))


def train_features(
    drawings: Drawings, config: LoopConfig, folder: Path, device: torch.device, workers: int = 0
) -> FeatureNetwork:
    """Train on all real drawings (the held-out ones too: they are real) to name their emoji and their style.

    Tones of skin are left out: an emoji is told from other emoji, not from itself.
    """
    numbers = torch.tensor([i for i, e in enumerate(drawings.entries) if not e.is_toned])
    entries = [drawings.entries[i] for i in numbers.tolist()]
    codes = number_emoji(entries)
    styles = torch.tensor([list(SETS).index(e.style) for e in entries])
    size = drawings.images.shape[-1]
    network = nn.ModuleDict(
        {
            "features": FeatureNetwork(size, FIRST_WIDTHS if size < 128 else WIDTHS),
            "emoji": nn.Linear(FEATURE_WIDTH, int(codes.max()) + 1),
            "style": nn.Linear(FEATURE_WIDTH, len(SETS)),
        }
    )
    network = place(network, device)
    ema = copy.deepcopy(network).requires_grad_(False)

    def draw(step: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = step_generator(config.seed, step)
        chosen = torch.randint(len(codes), (config.batch_size,), generator=generator)
        return disturb(to_unit(drawings.on_white(numbers[chosen])), generator), codes[chosen], styles[chosen]

    def naming_loss(pixels: Tensor, code: Tensor, style: Tensor) -> Tensor:
        with autocast(device):
            features = network["features"](pixels)
            guesses = network["emoji"](features), network["style"](features)
        loss = F.cross_entropy(guesses[0].float(), code, label_smoothing=0.1)
        return loss + F.cross_entropy(guesses[1].float(), style)

    batches, loss = Prefetch(draw, config.steps, workers), graphed(naming_loss, network.parameters(), device)
    train(network, lambda step, _: loss(*batches(step)), config, folder, ema)
    features = ema["features"]
    assert isinstance(features, FeatureNetwork)
    return features


def save_features(path: Path, network: FeatureNetwork) -> None:
    """Write the network in half precision."""
    tensors = {name: tensor.half() for name, tensor in network.state_dict().items()}
    widths = " ".join(str(width) for width in network.widths)
    write_safetensors(path, tensors, {"size": str(network.size), "widths": widths})


def load_features(path: Path) -> FeatureNetwork:
    """The network in a file; that of the first benchmark does not state its shape."""
    tensors, metadata = read_safetensors(path)
    widths = [int(width) for width in metadata.get("widths", "").split()] or FIRST_WIDTHS
    network = FeatureNetwork(int(metadata.get("size", 64)), widths)
    network.load_state_dict(tensors)
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
    """uint8 pictures (N, 3, S, S) -> features (N, 128), float32 on the CPU. Pictures larger than the network's are
    shrunk to its size."""
    device = next(network.parameters()).device
    small = images.shape[-1] <= network.size
    parts = (part if small else resize(part.float(), network.size) for part in images.split(batch_size))
    return torch.cat([network(to_unit(part).to(device)).float().cpu() for part in parts])
