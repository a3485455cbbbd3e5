"""DiT, class-conditional transformers (arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.families.family import ATTENTION, Family
from lcm_core.families.guidance_input import set_guidance
from lcm_core.families.vae import plain_latents
from lcm_core.networks.vae import load_vae


def predict(model: Any, x: Tensor, t: Tensor, class_labels: Tensor, timestep_cond: Tensor | None = None) -> Tensor:
    """Takes square latents; of what it gives, the variances that it has learnt are left out."""
    if x.shape[-1] != x.shape[-2]:
        raise InputError(f"a DiT paints squares, not {x.shape[-1]} x {x.shape[-2]} latents; give equal sides")
    set_guidance(model, timestep_cond)
    output: Tensor = model(x, timestep=t, class_labels=class_labels, return_dict=False)[0]
    return output[:, : x.shape[1]]


def count_labels(config: Mapping[str, Any]) -> tuple[int, int]:
    """There is always one label for none."""
    classes = int(config.get("num_embeds_ada_norm") or 1000)
    return classes, classes + 1


def complete(model: Any) -> None:
    """The places of patches are computed, not stored."""
    from diffusers.models.embeddings import PatchEmbed

    config, width = model.config, model.inner_dim
    side = config.sample_size
    places = PatchEmbed(side, side, config.patch_size, config.in_channels, width)
    model.pos_embed.pos_embed = places.pos_embed.to(next(model.parameters()).device)


FAMILY = Family(
    name="dit",
    pipeline="DiTPipeline",
    network="DiTTransformer2DModel",
    predict=predict,
    load_vae=load_vae,
    latents=plain_latents,
    lora_targets=(*ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1.linear"),
    count_labels=count_labels,
    is_square=True,
    is_flow=False,
    complete=complete,
    sample_size=32,
    steps=25,
)
