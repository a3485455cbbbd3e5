"""A student of a teacher with LoRAs, written as one LoRA for the teacher without them: style and speed in one file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lcm_core.files.checkpoint import read_component
from lcm_core.files.lora import Lora, read_lora
from lcm_core.files.lora_join import join, to_diffusers, to_kohya
from lcm_core.files.lora_keys import Part
from trainer.data.teacher import Teacher

PARTS: tuple[Part, ...] = ("unet", "text_encoder", "text_encoder_2")
_NOTED = 0.01  # share of a layer's change


def join_style(
    patch: Mapping[str, Tensor], teacher: Teacher, rank: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], str]:
    """The teacher's LoRAs and a student of it, together.

    Args:
        patch: the student's tensors.
        teacher: with LoRAs.
        rank: of layers of the teacher's LoRAs that are of another kind than plain ones.
        dtype: to store in.

    Returns:
        Tensors in the layout of the patch; and what the user should know, or nothing.
    """
    family = teacher.source.family
    loras: list[tuple[Lora, float]] = [*teacher.loras, (read_lora(patch), 1.0)]
    tensors: dict[str, Tensor] = {}
    worst = 0.0
    encoders = [part for part in PARTS[1:] if any(part in lora.layers for lora, _ in loras)]
    several = teacher.source.info.family == "sdxl"
    for part in ("unet", *encoders):
        place = teacher.source.unet if part == "unet" else teacher.source.text
        weights = read_component(place, part).tensors
        own = [(lora, strength) for lora, strength in loras if part in lora.layers]
        layers, lost = join(own, part, weights, rank, None if family is None else family.lora_names)
        worst = max(worst, lost)
        if family is not None:
            tensors |= to_diffusers(layers, family.folder, family.lora_names, dtype)
        else:
            tensors |= to_kohya(layers, _prefix(part, several), dtype)
    if worst <= _NOTED:
        return tensors, ""
    return tensors, (
        f"layers of the style are stored with rank {rank}, which leaves out up to {worst:.0%} of one; the patch beside "
        "the style has all of it"
    )


def _prefix(part: Part, several: bool) -> str:
    if part == "unet":
        return "lora_unet_"
    return {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[part] if several else "lora_te_"
