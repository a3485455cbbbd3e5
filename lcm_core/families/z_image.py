"""Z-Image (arXiv 2511.22699)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcm_core.families.family import ATTENTION, Family
from lcm_core.families.vae import plain_latents
from lcm_core.networks.conditioning import stack_rows
from lcm_core.networks.vae import load_vae


def encode(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """A language model's states of the prompt as a chat; prompts differ in length."""
    hidden, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return stack_rows([{"hidden": row, "mask": row.new_ones(len(row)).bool()} for row in hidden])


def predict(model: Any, x: Tensor, t: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
    """Takes lists of samples and texts, and time that runs from noise, 0, to picture, 1; so its velocity is ours
    turned round."""
    texts = [row[:length] for row, length in zip(hidden, mask.sum(1).tolist(), strict=True)]
    outputs = model(list(x.unsqueeze(2)), 1 - t / 1000, texts, return_dict=False)[0]
    return -torch.stack(list(outputs)).squeeze(2)


FAMILY = Family(
    name="z-image",
    pipeline="ZImagePipeline",
    network="ZImageTransformer2DModel",
    text_encoders={"text_encoder": "Qwen3Model"},
    encode=encode,
    predict=predict,
    load_vae=load_vae,
    latents=plain_latents,
    lora_targets=(*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    steps=50,
    guidance_scale=5.0,
)
