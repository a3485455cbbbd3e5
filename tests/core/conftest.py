"""Tiny random models in the layouts that the pipeline loads; made once for all tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lcm_core.pipeline import Pipeline

WIDTH = 128  # of the text embedding


def _tokenizer(folder: Path) -> int:
    """CLIP's byte-level tokenizer without a single merge: every prompt is spelt out. Returns the vocabulary's size."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder)
    return len(tokens)


def _text_encoder(vocabulary: int, layers: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            projection_dim=WIDTH,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def _unet(levels: int, **settings: Any) -> Any:
    """As deep as Stable Diffusion's with four levels; of fewer, the first and the last are left."""
    from diffusers import UNet2DConditionModel

    plain = levels - 1
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(*(32, 32, 64)[:plain], 64),
        down_block_types=(*("CrossAttnDownBlock2D",) * plain, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * plain),
        layers_per_block=1,
        norm_num_groups=8 * levels,  # with one channel in a group, the least picture would have nothing to normalise
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
        **settings,
    )


def _vae(width: int, groups: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(width,) * 4,
        norm_num_groups=groups,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.18215,
    )


SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}


def lora_tensors(width: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA in kohya's layout for the middle block's self-attention, `width` channels wide."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in ("to_q", "to_k", "to_v", "to_out_0"):
        key = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_{name}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(width, rank, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    return tensors


@pytest.fixture
def wide_lora(tmp_path: Path) -> Path:
    """A LoRA for a network as wide as Stable Diffusion 1.x."""
    save_file(lora_tensors(1280), tmp_path / "wide.safetensors")
    return tmp_path / "wide.safetensors"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `plain` and `lcm` (diffusers folders) and `emoji` (the embedded model's layout), random weights."""
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def lcm(models: Path) -> Pipeline:
    """A full LCM."""
    return Pipeline.load(models / "emoji", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def plain(models: Path) -> Pipeline:
    """A model that wants a negative pass."""
    return Pipeline.load(models / "plain", device="cpu", dtype="float32")


def make_models(root: Path, least: bool = False) -> Path:
    """The models of the fixture `models`, in an empty folder, which is returned.

    Args:
        root: the folder.
        least: of as few layers and channels as still have every kind of layer, for thousands of runs.
    """
    levels, layers, width, groups = (2, 1, 8, 4) if least else (4, 2, 32, 32)
    torch.manual_seed(0)
    vocabulary = _tokenizer(root / "plain" / "tokenizer")
    _text_encoder(vocabulary, layers).save_pretrained(root / "plain" / "text_encoder")
    _vae(width, groups).save_pretrained(root / "plain" / "vae")
    _unet(levels).save_pretrained(root / "plain" / "unet")
    (root / "plain" / "scheduler").mkdir()
    (root / "plain" / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    for other in ("lcm", "emoji"):
        (root / other).mkdir()
        for part in ("tokenizer", "text_encoder", "vae"):
            (root / other / part).symlink_to(root / "plain" / part)
    (root / "lcm" / "scheduler").symlink_to(root / "plain" / "scheduler")
    _unet(levels, time_cond_proj_dim=256).save_pretrained(root / "lcm" / "unet")
    (root / "emoji" / "unet_lcm").symlink_to(root / "lcm" / "unet")
    (root / "emoji" / "unet_teacher").symlink_to(root / "plain" / "unet")
    card = {
        "name": "emoji",
        "resolution": 64,
        "prediction_type": "epsilon",
        "schedule": {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        "original_steps": 50,
        "guidance_scale": 4.0,
        "teacher_guidance_scale": 3.0,
        "teacher_steps": 25,
    }
    (root / "emoji" / "model.json").write_text(json.dumps(card))
    (root / "emoji" / "lora").mkdir()
    save_file(lora_tensors(64), root / "emoji" / "lora" / "lcm_lora.safetensors")
    return root
