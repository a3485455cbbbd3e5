"""Which family a model is of."""

from __future__ import annotations

from pathlib import Path

from lcm_core.errors import InputError
from lcm_core.families import class_unet, dit, flux, flux2, qwen_image, sd3, wan, z_image
from lcm_core.families.family import Family
from lcm_core.families.labels import INDEX
from lcm_core.files.safetensors import read_json

FAMILIES = tuple(module.FAMILY for module in (sd3, flux, flux2, qwen_image, z_image, wan, dit))
CLASS_UNETS = (class_unet.FAMILY, class_unet.CONDITIONAL)


def find_family(root: Path) -> Family | None:
    """The family of a diffusers folder; None for Stable Diffusion 1.x, 2.x, XL, and for what is no such folder.

    Raises:
        InputError: a model with two networks, one for each half of the noise levels.
    """
    index = read_json(root / INDEX) if (root / INDEX).is_file() else {}
    family = next((family for family in FAMILIES if family.pipeline == index.get("_class_name")), None)
    if family is not None and (root / "transformer_2").is_dir():
        raise InputError(
            f"{root} has two networks, for noisy and for nearly clean samples, which are not supported; "
            "give a model with one, e.g. Wan 2.1 or Wan 2.2 5B"
        )
    return family or _find_class_unet(root)


def is_class_conditional(name: str) -> bool:
    """Whether the family of this name paints classes, not texts."""
    return any(family.name == name for family in (*FAMILIES, *CLASS_UNETS) if family.count_labels is not None)


def _find_class_unet(root: Path) -> Family | None:
    """A U-Net that reads a label, in a folder without text encoders."""
    file = root / class_unet.FAMILY.folder / "config.json"
    if not file.is_file() or (root / "text_encoder").exists():
        return None
    config = read_json(file)
    if type(config.get("num_class_embeds")) is not int:
        return None
    return next((family for family in CLASS_UNETS if family.network == config.get("_class_name")), None)
