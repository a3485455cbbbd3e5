"""LoRA files merged into the networks of a model, for good."""

from __future__ import annotations

from collections.abc import Sequence

from lcm_core.families.network import FamilyNetwork
from lcm_core.files.lora import Lora, check_parts, merge
from lcm_core.files.lora_keys import Part
from lcm_core.pipeline.parts import DenoisingNetwork, Text

_TEXT_PARTS: tuple[Part, ...] = ("text_encoder", "text_encoder_2")


def merge_loras(unet: DenoisingNetwork, text: Text, loras: Sequence[tuple[Lora, float]]) -> None:
    """Merge LoRAs into the U-Net and the text encoders, for good.

    Raises:
        InputError: one is for another architecture.
    """
    for lora, _ in loras:
        check_parts(lora, ("unet", *_TEXT_PARTS[: len(text.encoders)]))
    merge_into_network(unet, loras)
    merge_into_text(text, loras)


def merge_into_network(network: DenoisingNetwork, loras: Sequence[tuple[Lora, float]]) -> None:
    """Merge LoRAs into the network that predicts, for good.

    Raises:
        InputError: one is for another architecture.
    """
    if loras:
        other_names = network.family.lora_names if isinstance(network, FamilyNetwork) else None
        merge(network.model, loras, keep_originals=False, other_names=other_names)


def merge_into_text(text: Text, loras: Sequence[tuple[Lora, float]]) -> None:
    """Merge LoRAs into the text encoders, for good.

    Raises:
        InputError: one is for another architecture.
    """
    if loras:
        for part, encoder in zip(_TEXT_PARTS, text.encoders, strict=False):
            merge(encoder.model, loras, part, keep_originals=False)
        text.clear_cache()
