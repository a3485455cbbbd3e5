"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lcm_core.families.family import ATTENTION, TEXT_ATTENTION, Family
from lcm_core.families.vae import plain_latents
from lcm_core.networks.vae import load_vae


def encode(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Two CLIP encoders and, where the model has it, T5."""
    hidden, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def predict(model: Any, x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
    """Takes latents and timesteps as they are."""
    output: Tensor = model(hidden_states=x, timestep=t, **conditioning, return_dict=False)[0]
    return output


FAMILY = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    network="SD3Transformer2DModel",
    text_encoders={
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    },
    encode=encode,
    predict=predict,
    load_vae=load_vae,
    latents=plain_latents,
    lora_targets=(
        *ATTENTION,
        *TEXT_ATTENTION,
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    guidance_scale=7.0,
)
