"""What a loaded network, and a LoRA for it, can take; told by names and headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from lcm_core.errors import InputError
from lcm_core.files.lora_keys import parse_key
from lcm_core.files.safetensors import check_file

_CONTEXT = "attn2.to_k.weight"


def check_network(name: str, network: nn.Module, prediction_type: str) -> None:
    """Refuse models that have no timesteps to skip.

    Raises:
        InputError: SD3, Flux and other flow models; networks of another kind than SD 1.x, SD 2.x and SDXL.
    """
    if prediction_type not in ("epsilon", "v_prediction") or not hasattr(network, "time_embed"):
        raise InputError(
            f"{name} is no model for LCM or TCD, which skip the timesteps of SD 1.x, SD 2.x and SDXL; "
            "for SD3, Flux and others of their kind choose a sampler such as Euler"
        )


def network_width(network: nn.Module) -> int | None:
    """Width of the text embeddings that a network reads; None if it reads none, or packs its weights (Forge's NF4)."""
    weight = next((weight for name, weight in network.named_parameters() if name.endswith(_CONTEXT)), None)
    return int(weight.shape[1]) if weight is not None and weight.is_floating_point() else None


def context_width(file: Path) -> int | None:
    """Width of the text that a LoRA's network reads: 768 for SD 1.x, 1024 for SD 2.x, 2048 for SDXL. None if unsaid."""
    if file.suffix != ".safetensors":
        return None
    for key, entry in check_file(file).items():
        if "attn2" in key and "to_k" in key and _is_unet_down(key):
            return int(entry["shape"][1])
    return None


def check_loras(found: Mapping[str, Path | None], width: int | None) -> None:
    """Refuse LoRAs of another architecture, which the host would leave out without a word in the picture.

    Args:
        found: files by their names in the prompt; None for those that the host itself will miss.
        width: of the text that the loaded network reads, if that is known.

    Raises:
        InputError: one of them is for a network that reads text of another width.
    """
    for name, file in found.items():
        made_for = context_width(file) if file is not None else None
        if None not in (made_for, width) and made_for != width:
            raise InputError(
                f"LoRA '{name}' was made for {_name(made_for)}, but the loaded checkpoint is {_name(width)}; "
                "take it out of the prompt or load a checkpoint that it fits"
            )


def _is_unet_down(key: str) -> bool:
    try:
        address = parse_key(key)
    except InputError:  # another kind of adapter, which the host may well know
        return False
    return address.part == "unet" and address.role == "down"


def _name(width: int | None) -> str:
    known = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
    return known.get(width or 0, f"a network with text of width {width}")
