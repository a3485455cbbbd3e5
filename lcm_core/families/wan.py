"""Wan 2.x, text to video (arXiv 2503.20314). One frame is a picture."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lcm_core.families.family import ATTENTION, Family
from lcm_core.families.vae import load_video_vae, video_latents

_TOKENS = 512  # that diffusers' pipeline pads a prompt to


def encode(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """umT5's words, with zeros behind them."""
    hidden, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=_TOKENS)
    return {"encoder_hidden_states": hidden}


def predict(model: Any, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    """Takes video latents and timesteps as they are."""
    words = encoder_hidden_states
    output: Tensor = model(hidden_states=x, timestep=t, encoder_hidden_states=words, return_dict=False)[0]
    return output


FAMILY = Family(
    name="wan",
    pipeline="WanPipeline",
    network="WanTransformer3DModel",
    text_encoders={"text_encoder": "UMT5EncoderModel"},
    encode=encode,
    predict=predict,
    load_vae=load_video_vae,
    latents=video_latents,
    lora_targets=(*ATTENTION, "ffn.net.0.proj", "ffn.net.2"),
    sample_size=60,
    steps=50,
    guidance_scale=5.0,
    is_video=True,
    lora_names={
        "attn1.to_q": "self_attn.q",
        "attn1.to_k": "self_attn.k",
        "attn1.to_v": "self_attn.v",
        "attn1.to_out.0": "self_attn.o",
        "attn2.to_q": "cross_attn.q",
        "attn2.to_k": "cross_attn.k",
        "attn2.to_v": "cross_attn.v",
        "attn2.to_out.0": "cross_attn.o",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
    },
)
