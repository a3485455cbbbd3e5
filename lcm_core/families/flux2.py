"""Flux.2 klein. Its latents are patches of 2 x 2 already, so that a pixel of them is a token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lcm_core.families.family import ATTENTION, TEXT_ATTENTION, Family, Scheduler
from lcm_core.families.vae import load_patched_vae, patched_latents

_LONG = 4300  # tokens beyond which the shift does not depend on the steps


def encode(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """States of three layers of a language model, side by side."""
    hidden, _ = pipe.encode_prompt(prompts)
    return {"encoder_hidden_states": hidden}


def predict(model: Any, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    """Takes tokens with their places, and timesteps in [0, 1]."""
    from einops import rearrange

    height, width, words = *x.shape[-2:], encoder_hidden_states.shape[1]
    output = model(
        hidden_states=rearrange(x, "b c h w -> b (h w) c"),
        timestep=t / 1000,
        guidance=None,
        encoder_hidden_states=encoder_hidden_states,
        txt_ids=_places(1, 1, words).to(x.device).expand(len(x), -1, -1),
        img_ids=_places(height, width, 1).to(x.device).expand(len(x), -1, -1),
        return_dict=False,
    )[0]
    return rearrange(output, "b (h w) c -> b c h w", h=height)


def _places(height: int, width: int, words: int) -> Tensor:
    """(height * width * words, 4): 0, row, column, word."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(words))


def shift(scheduler: Scheduler, tokens: int, steps: int) -> float:
    """e^mu, with mu a line in the tokens at 10 and at 200 steps, and a line in the steps between: the model's own
    constants, as diffusers' `compute_empirical_mu` has them."""
    long = 0.00016927 * tokens + 0.45666666
    short = 8.73809524e-05 * tokens + 1.89833333
    return math.exp(long if tokens > _LONG else long + (short - long) * (200 - steps) / 190)


FAMILY = Family(
    name="flux2",
    pipeline="Flux2KleinPipeline",
    network="Flux2Transformer2DModel",
    text_encoders={"text_encoder": "Qwen3ForCausalLM"},
    encode=encode,
    predict=predict,
    load_vae=load_patched_vae,
    latents=patched_latents,
    lora_targets=(
        *ATTENTION,
        *TEXT_ATTENTION,
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        *("attn.to_qkv_mlp_proj", "attn.to_out"),
    ),
    patch=1,
    sample_size=64,
    steps=50,
    shift=shift,
)
