"""Which family a model is of."""

from __future__ import annotations

from pathlib import Path

from lcm_core.errors import InputError
from lcm_core.families import flux, flux2, qwen_image, sd3, wan, z_image
from lcm_core.families.family import FlowFamily
from lcm_core.files.safetensors import read_json

FAMILIES = tuple(module.FAMILY for module in (sd3, flux, flux2, qwen_image, z_image, wan))
INDEX = "model_index.json"


def find_family(root: Path) -> FlowFamily | None:
    """The family of a diffusers folder; None for Stable Diffusion 1.x, 2.x, XL, and for what is no such folder.

    Raises:
        InputError: a model with two networks, one for each half of the noise levels.
    """
    if not (root / INDEX).is_file():
        return None
    index = read_json(root / INDEX)
    family = next((family for family in FAMILIES if family.pipeline == index.get("_class_name")), None)
    if family is not None and (root / "transformer_2").is_dir():
        raise InputError(
            f"{root} has two networks, for noisy and for nearly clean samples, which are not supported; "
            "give a model with one, e.g. Wan 2.1 or Wan 2.2 5B"
        )
    return family
