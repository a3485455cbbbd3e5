"""Tiny class-conditional models with random weights, as diffusers' own classes write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SCHEDULER = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False}
NAMES = {0: "cat, tabby", 1: "dog", 2: "bird"}
KINDS = ("dit", "UNet2DModel", "UNet2DConditionModel")


def build_network(kind: str) -> Any:
    """A network for latents of 8 x 8."""
    import diffusers

    torch.manual_seed(0)
    if kind == "dit":
        network: Any = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            out_channels=8,
            sample_size=8,
            num_embeds_ada_norm=1000,
        )
    else:
        plain = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 8, "num_class_embeds": 4}
        blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
        middle = {"mid_block_type": "UNetMidBlock2D"} if kind == "UNet2DConditionModel" else {"attention_head_dim": 8}
        network = getattr(diffusers, kind)(block_out_channels=(16, 32), layers_per_block=1, **plain, **blocks, **middle)
    with torch.no_grad():  # ada_norm_zero and others begin as nothing
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def save_model(kind: str, folder: Path) -> Path:
    """A diffusers folder; of the DiT as its pipeline writes it."""
    import diffusers

    network = build_network(kind)
    torch.manual_seed(1)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks).eval()
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", **SCHEDULER)
    if kind == "dit":
        diffusers.DiTPipeline(network, vae, scheduler).save_pretrained(folder)
    else:
        network.save_pretrained(folder / "unet")
        vae.save_pretrained(folder / "vae")
        scheduler.save_pretrained(folder / "scheduler")
    file = folder / "model_index.json"
    index = json.loads(file.read_text()) if file.is_file() else {}
    names = NAMES if kind != "dit" else {**NAMES, **{number: f"thing {number}" for number in range(3, 1000)}}
    file.write_text(json.dumps({**index, "id2label": names}))
    return folder


def models_in(root: Path) -> Callable[[str], Path]:
    """`make(kind)`: the folder of a model under `root`, which is made once."""

    def make(kind: str) -> Path:
        folder = root / kind
        return folder if folder.exists() else save_model(kind, folder)

    return make
