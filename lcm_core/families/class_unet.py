"""U-Nets that read a class label (`num_class_embeds`) and no text, in latents: diffusers' two classes of them.

Their folder is a usual one, with `unet`, `vae` and `scheduler`; the names of the labels are in `id2label` of its index,
as DiT's are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lcm_core.families.family import Family
from lcm_core.families.guidance_input import set_guidance
from lcm_core.families.vae import plain_latents
from lcm_core.networks.lora_layers import TARGET_MODULES
from lcm_core.networks.vae import load_vae


def predict(model: Any, x: Tensor, t: Tensor, class_labels: Tensor, timestep_cond: Tensor | None = None) -> Tensor:
    """The output of a UNet2DModel."""
    set_guidance(model, timestep_cond)
    output: Tensor = model(x, t, class_labels, return_dict=False)[0]
    return output


def predict_conditional(
    model: Any, x: Tensor, t: Tensor, class_labels: Tensor, timestep_cond: Tensor | None = None
) -> Tensor:
    """The output of a UNet2DConditionModel, which reads guidance by itself."""
    output: Tensor = model(x, t, None, class_labels, timestep_cond, return_dict=False)[0]
    return output


def count_labels(config: Mapping[str, Any]) -> tuple[int, int]:
    """Whether the last stands for no class, the names alone can tell."""
    return config["num_class_embeds"], config["num_class_embeds"]


FAMILY = Family(
    name="class-unet",
    pipeline="",
    network="UNet2DModel",
    predict=predict,
    load_vae=load_vae,
    latents=plain_latents,
    lora_targets=TARGET_MODULES,
    count_labels=count_labels,
    is_flow=False,
    folder="unet",
    sample_size=32,
    steps=25,
)
CONDITIONAL = replace(FAMILY, network="UNet2DConditionModel", predict=predict_conditional)
