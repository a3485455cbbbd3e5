"""Key names of LoRA files, sorted into networks, modules and roles. Strings only.

Layouts: kohya's, LyCORIS', OneTrainer's, diffusers' (old and new), peft's, ComfyUI's.

A module is known by its *flat name*: its path with underscores for dots, as kohya writes it, because that cannot be
undone without the network at hand.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

from lcm_core.errors import InputError
from lcm_core.files.ldm_keys import UNetTopology, inverted, rename, unet_map

Part = Literal["unet", "text_encoder", "text_encoder_2"]
Role = str
"""down, up, mid, alpha, dora_scale, magnitude (peft's name of it), or a LoHa's or LoKr's own name: hada_w1_a, ..."""

KOHYA_PREFIXES: dict[str, Part] = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}
_PREFIXES: dict[str, Part] = {  # of two that begin alike, the longer comes first
    **KOHYA_PREFIXES,
    **{prefix.replace("lora_", "lycoris_"): part for prefix, part in KOHYA_PREFIXES.items()},
    "lycoris_text_model_": "text_encoder",
    "lycoris_": "unet",
    "unet.": "unet",
    "transformer.": "unet",
    "lora_transformer_": "unet",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
_WRAPPER = "base_model.model."  # peft's, before or behind the network's prefix
_LETTERS = {"A": "down", "B": "up"}
_KEY = re.compile(
    r"(?P<module>.+?)(\.lora_(?P<letter>[AB])((\.\w+)?\.weight)?"
    r"|[._]lora(_linear_layer)?[._](?P<half>down|up|mid)\.weight"
    r"|\.(?P<number>alpha|dora_scale)"
    r"|\.(?P<magnitude>lora_magnitude_vector)((\.\w+)?\.weight|\.\w+)?"
    r"|\.(?P<factor>hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2))(\.\w+)?)"
)
_OTHER_KINDS = {  # patterns of their keys
    r"\.(oft|boft)_|\.oft_diag": "OFT",
    r"\.on_input$": "IA3",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.lora_embedding_": "embedding LoRA",
    r"\.lora_\w+(\.\w+)?\.bias$": "LoRA with biases",
    r"\.(w_norm|b_norm)$": "difference of norm layers",
    r"\.(diff|diff_b)$": "full difference",
}
_ARCHITECTURES = {  # parts of the module names of models that are no U-Nets
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux or a relative of it",
    r"joint_blocks|context_block": "SD 3",
    r"lora_te3_|text_encoder_3": "SD 3 or Flux",
    r"lora_prior|prior_": "Stable Cascade",
    r"transformer[._](transformer_)?blocks[._]\d|^(blocks|layers)[._]\d": "a diffusion transformer",
}


class Address(NamedTuple):
    """What one tensor of a LoRA file is."""

    part: Part
    path: str
    """The module as the file names it, without the network's prefix."""
    role: Role


def parse_key(key: str) -> Address:
    """Read one key of a LoRA file.

    Raises:
        InputError: the key belongs to another kind of adapter, or to none that is known.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        kind = next((name for mark, name in _OTHER_KINDS.items() if re.search(mark, key)), None)
        if kind:
            raise InputError(
                f"it is a {kind} ('{key}'), not a LoRA, DoRA, LoHa or LoKr; merge it in the "
                "tool that made it, or convert it"
            )
        raise InputError(
            f"'{key}' is no key of a LoRA in a layout of kohya, LyCORIS, diffusers or peft; give a LoRA file"
        )
    letter = match["letter"] and _LETTERS[match["letter"]]
    magnitude = match["magnitude"] and "magnitude"
    role: Role = letter or match["half"] or match["number"] or magnitude or match["factor"]
    path = match["module"].removeprefix(_WRAPPER)
    for prefix, part in _PREFIXES.items():
        if path.startswith(prefix):
            kept = "text_model_" if prefix.endswith("text_model_") else ""
            return Address(part, _modern(kept + path.removeprefix(prefix).removeprefix(_WRAPPER)), role)
    return Address("text_encoder" if path.startswith("text_model.") else "unet", _modern(path), role)


def is_adapter_key(key: str) -> bool:
    """Whether a key with this name belongs to an adapter, not to a checkpoint."""
    match = _KEY.fullmatch(key)
    return match is not None and match["number"] is None


def name_architecture(flat: str) -> str | None:
    """The kind of model that has a module of this name, if it is one without a U-Net; else None."""
    return next((name for mark, name in _ARCHITECTURES.items() if re.search(mark, flat)), None)


def flat_names(paths: Collection[str], part: Part, others: Mapping[str, str] | None = None) -> dict[str, str]:
    """A table from every flat name that a LoRA may use for a module to the module's path in this network.

    Args:
        paths: of the network's modules.
        part: a U-Net's modules also go by their ldm names, a text encoder's with and without `text_model`.
        others: ends of paths -> of further names of them.
    """
    names = {path.replace(".", "_"): path for path in paths}
    names |= {renamed(path, others or {}).replace(".", "_"): path for path in paths}
    if part == "unet":
        ldm = inverted(unet_map(UNetTopology.from_diffusers(f"{path}." for path in paths)))
        aliases: Iterable[tuple[str | None, str]] = ((rename(path, ldm), path) for path in paths)
    else:
        aliases = ((path.removeprefix("text_model."), path) for path in paths)
        names |= {f"text_model_{flat}": path for flat, path in names.items()}
    return {alias.replace(".", "_"): path for alias, path in aliases if alias} | names


def renamed(path: str, ends: Mapping[str, str]) -> str:
    """A path with its end changed to what `ends` has for it, if it has something."""
    end = next((end for end in ends if path.endswith(f".{end}")), None)
    return path if end is None else path.removesuffix(end) + ends[end]


def _modern(path: str) -> str:
    """Old diffusers files name the attention processor's part, not the layer."""
    path = path.replace(".processor.", ".")
    return path + ".0" if path.endswith((".attn1.to_out", ".attn2.to_out")) else path
