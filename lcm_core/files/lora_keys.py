"""LoRA key names: kohya's, diffusers' (old and new) and peft's, sorted into networks, modules and halves. Strings only.

A module is known by its *flat name*: its path with underscores for dots, as kohya writes it, because that cannot be
undone without the network at hand.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from lcm_core.errors import InputError
from lcm_core.files.ldm_keys import UNetTopology, inverted, rename, unet_map

Part = Literal["unet", "text_encoder", "text_encoder_2"]
Role = Literal["down", "up", "alpha"]

KOHYA_PREFIXES: dict[str, Part] = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}
_PATH_PREFIXES: dict[str, Part] = {
    "unet.": "unet",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
}
_KEY = re.compile(
    r"(?P<module>.+?)(\.lora_(?P<letter>[AB])(\.\w+)?\.weight|[._]lora(_linear_layer)?[._](?P<half>down|up)\.weight|\.alpha)"
)
_OTHER_KINDS = {  # patterns of their keys
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.lora_mid\.": "Tucker LoRA",
    r"\.oft_": "OFT",
    r"\.lora_embedding_": "embedding LoRA",
    r"\.(diff|diff_b)$": "full difference",
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
                f"it is a {kind} ('{key}'), not a plain LoRA; merge it in the tool that made it, or convert it"
            )
        raise InputError(f"'{key}' is no key of a LoRA in kohya's, diffusers' or peft's layout; give a LoRA file")
    letter = {"A": "down", "B": "up", None: None}[match["letter"]]
    role: Role = letter or match["half"] or "alpha"  # type: ignore[assignment]
    path = match["module"].removeprefix("base_model.model.")
    for prefix, part in (KOHYA_PREFIXES | _PATH_PREFIXES).items():
        if path.startswith(prefix):
            return Address(part, _modern(path.removeprefix(prefix)), role)
    return Address("text_encoder" if path.startswith("text_model.") else "unet", _modern(path), role)


def flat_names(paths: Collection[str], part: Part) -> dict[str, str]:
    """From every flat name that a LoRA may use for a module to the module's path in this network.

    Args:
        paths: of the network's modules.
        part: a U-Net's modules also go by their ldm names, a text encoder's with and without `text_model`.
    """
    names = {path.replace(".", "_"): path for path in paths}
    if part == "unet":
        ldm = inverted(unet_map(UNetTopology.from_diffusers(f"{path}." for path in paths)))
        aliases: Iterable[tuple[str | None, str]] = ((rename(path, ldm), path) for path in paths)
    else:
        aliases = ((path.removeprefix("text_model."), path) for path in paths)
        names |= {f"text_model_{flat}": path for flat, path in names.items()}
    return {alias.replace(".", "_"): path for alias, path in aliases if alias} | names


def _modern(path: str) -> str:
    """Old diffusers files name the attention processor's part, not the layer."""
    path = path.replace(".processor.", ".")
    return path + ".0" if path.endswith((".attn1.to_out", ".attn2.to_out")) else path
