"""A small teacher and a few pictures, made once for all tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lcm_core.files.checkpoint import read_component, save_component
from lcm_core.pipeline.sources import MODELS

WIDTH = 128  # of the embedded model's text embedding
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "rescale_betas_zero_snr": False,
}


def build_unet(**settings: Any) -> Any:
    """An untrained U-Net of Stable Diffusion's shape in miniature, whose output is not zero."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    small = {
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{"sample_size": 8, "cross_attention_dim": WIDTH, **small, **settings})


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`teachers(prediction_type, zero_snr)`: a diffusers folder with a tiny U-Net and the embedded model's VAE and text
    encoder."""
    root = tmp_path_factory.mktemp("teachers")

    def make(prediction_type: str = "epsilon", zero_snr: bool = False) -> Path:
        folder = root / f"{prediction_type}{'-zero' * zero_snr}"
        if not folder.exists():
            build_unet().save_pretrained(folder / "unet")
            for part in ("text_encoder", "tokenizer"):
                (folder / part).symlink_to(MODELS / "emoji" / part)
            save_component(folder / "vae", read_component(MODELS / "emoji", "vae"))
            (folder / "scheduler").mkdir()
            stated = {**SCHEDULER, "prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
            (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(stated))
        return folder

    return make


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of 64 x 64 with captions."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for number in range(6):
        pixels = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(number)) * 255
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}")
    return folder
