"""Flux.1, dev and schnell. dev reads its guidance as an input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcm_core.families.family import ATTENTION, TEXT_ATTENTION, Family
from lcm_core.families.patches import from_patches, to_patches
from lcm_core.families.vae import plain_latents
from lcm_core.networks.vae import load_vae


def encode(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """CLIP's summary and T5's words."""
    hidden, pooled, _ = pipe.encode_prompt(prompts, None)
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def predict(
    model: Any,
    x: Tensor,
    t: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    guidance: Tensor | None = None,
) -> Tensor:
    """Takes patches of 2 x 2, with their places, and timesteps in [0, 1]."""
    height, width = (side // 2 for side in x.shape[-2:])
    output = model(
        hidden_states=to_patches(x),
        timestep=t / 1000,
        guidance=guidance,
        encoder_hidden_states=encoder_hidden_states,
        pooled_projections=pooled_projections,
        txt_ids=x.new_zeros(encoder_hidden_states.shape[1], 3),
        img_ids=_places(height, width).to(x),
        return_dict=False,
    )[0]
    return from_patches(output, height)


def _places(height: int, width: int) -> Tensor:
    """(height * width, 3): 0, row and column of each patch."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))


FAMILY = Family(
    name="flux",
    pipeline="FluxPipeline",
    network="FluxTransformer2DModel",
    text_encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
    encode=encode,
    predict=predict,
    load_vae=load_vae,
    latents=plain_latents,
    lora_targets=(
        *ATTENTION,
        *TEXT_ATTENTION,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    ),
    guidance_scale=3.5,
)
