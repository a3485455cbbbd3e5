"""What a loaded network, and a LoRA for it, can take; told by names and headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from extension_a1111.translation import Mistake
from lcm_core.errors import InputError
from lcm_core.files.lora_keys import parse_key
from lcm_core.files.safetensors import check_file

FLOW = "const"
"""What `prediction_of` calls a network that predicts a rectified flow's velocity, as Forge does."""
_CONTEXT = "attn2.to_k.weight"
_PREDICTIONS = {"EPS": "epsilon", "V_PREDICTION": "v_prediction"}
_OTHER_PROCESSES = ("EDM", "X0", "IMG_TO_IMG", "CONST", "COSMOS_RFLOW")
# They are asked at no table's timesteps, whatever their networks predict.
_CONTINUOUS = ("ModelSamplingContinuousEDM", "ModelSamplingContinuousV", "PredictionContinuousEDM", "PredictionEDM")
# The first part of a key in a LoRA for a transformer, in kohya's, ComfyUI's and diffusers' names.
_TRANSFORMER = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.|lora_transformer_|(?:lora_unet_|diffusion_model\.)(?:double|single|joint)_)"
)


def check_network(name: str, network: nn.Module, prediction_type: str) -> None:
    """Refuse models that have no timesteps to skip.

    Raises:
        InputError: networks of another kind than SD 1.x, SD 2.x and SDXL; SD3, Flux and other flow models are among
            them in hosts that cannot mix their noise.
    """
    if prediction_type not in ("epsilon", "v_prediction") or not hasattr(network, "time_embed"):
        raise Mistake(
            "{name} is no model for LCM or TCD, which skip the timesteps of SD 1.x, SD 2.x and SDXL; "
            "for SD3, Flux and others of their kind choose a sampler such as Euler, or use Forge",
            name=name,
        )


def prediction_of(process: object) -> str:
    """What a network predicts, told by the part of a host that knows its noise process.

    Forge's has the name in `prediction_type`. ComfyUI's, which reForge uses, is a class made of `EPS`, `V_PREDICTION`
    and others that derive from these two and mean something else: the nearest name counts.
    """
    names = [kind.__name__ for kind in type(process).__mro__]
    if continuous := next((name for name in names if name in _CONTINUOUS), None):
        return continuous
    stated = getattr(process, "prediction_type", None)
    if stated is not None:
        return str(stated)
    return next((_PREDICTIONS.get(name, name) for name in names if name in (*_PREDICTIONS, *_OTHER_PROCESSES)), "other")


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


def checkpoint_width(file: Path) -> int | None:
    """Width of the text that a checkpoint's U-Net reads, from the file's header; None if it has none.

    Raises:
        InputError: no safetensors file.
    """
    shapes = (entry["shape"] for key, entry in check_file(file).items() if key.endswith(_CONTEXT))
    return next((int(shape[1]) for shape in shapes if len(shape) == 2), None)


def is_for_transformer(file: Path) -> bool:
    """Whether a LoRA was made for Flux, SD3 or another network that is no U-Net."""
    return file.suffix == ".safetensors" and any(_TRANSFORMER.match(key) for key in check_file(file))


def check_loras(found: Mapping[str, Path | None], width: int | None) -> None:
    """Refuse LoRAs of another architecture, which the host would leave out without a word in the picture.

    Args:
        found: files by their names in the prompt; None for those that the host itself will miss.
        width: of the text that the loaded network reads, if that is known.

    Raises:
        InputError: one of them is for a network that reads text of another width.
    """
    for name, file in found.items():
        if file is not None and width is not None and is_for_transformer(file):
            raise Mistake(
                "LoRA '{name}' was made for a transformer such as Flux or SD3, but the loaded checkpoint is "
                "{loaded}, where it does nothing; take it out of the prompt",
                name=name,
                loaded=_name(width),
            )
        made_for = context_width(file) if file is not None else None
        if None not in (made_for, width) and made_for != width:
            raise Mistake(
                "LoRA '{name}' was made for {made_for}, but the loaded checkpoint is {loaded}; "
                "take it out of the prompt or load a checkpoint that it fits",
                name=name,
                made_for=_name(made_for),
                loaded=_name(width),
            )


def _is_unet_down(key: str) -> bool:
    try:
        address = parse_key(key)
    except InputError:  # another kind of adapter, which the host may well know
        return False
    return address.part == "unet" and address.role == "down"


def _name(width: int | None) -> str:
    known = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
    return known.get(width or 0, f"U-Net ({width})")
