"""Qwen-Image (arXiv 2508.02324)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcm_core.families.family import ATTENTION, TEXT_ATTENTION, Family
from lcm_core.families.patches import from_patches, to_patches
from lcm_core.families.vae import load_still_vae, still_latents


def encode(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """A language model's states behind a template; prompts differ in length."""
    hidden, mask = pipe.encode_prompt(prompts)
    mask = torch.ones(hidden.shape[:2]) if mask is None else mask
    return {"encoder_hidden_states": hidden, "encoder_hidden_states_mask": mask.bool()}


def predict(
    model: Any, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_mask: Tensor
) -> Tensor:
    """Takes patches of 2 x 2, and timesteps in [0, 1]."""
    height, width = (side // 2 for side in x.shape[-2:])
    output = model(
        hidden_states=to_patches(x),
        timestep=t / 1000,
        encoder_hidden_states=encoder_hidden_states,
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        img_shapes=[[(1, height, width)]] * len(x),
        return_dict=False,
    )[0]
    return from_patches(output, height)


FAMILY = Family(
    name="qwen-image",
    pipeline="QwenImagePipeline",
    network="QwenImageTransformer2DModel",
    text_encoders={"text_encoder": "Qwen2_5_VLForConditionalGeneration"},
    encode=encode,
    predict=predict,
    load_vae=load_still_vae,
    latents=still_latents,
    lora_targets=(
        *ATTENTION,
        *TEXT_ATTENTION,
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
    steps=50,
)
