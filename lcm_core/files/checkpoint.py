"""Models of any kind, read: diffusers folders and single-file SD 1.x, SD 2.x and SDXL checkpoints. Safetensors only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError
from lcm_core.files import safetensors as weights
from lcm_core.files.architecture import Family
from lcm_core.files.components import COMPONENTS, Component, Config, ModelInfo
from lcm_core.files.configurations import check_config, check_scheduler
from lcm_core.files.folder import save_component, save_diffusers, scheduler_config
from lcm_core.files.quantised import dequantise
from lcm_core.files.safetensors import PathLike, check_finite, read_safetensors, write_safetensors
from lcm_core.files.single_file import (
    AS_FLOW,
    CONFIG_KEY,
    TOKENIZER_KEY,
    Checkpoint,
    detect_architecture,
    detect_prediction,
    modern,
    save_single_file,
)

__all__ = [
    "AS_FLOW",
    "COMPONENTS",
    "CONFIG_KEY",
    "TOKENIZER_KEY",
    "Checkpoint",
    "Component",
    "ModelInfo",
    "ModelPath",
    "check_finite",
    "detect_architecture",
    "detect_prediction",
    "list_components",
    "read_component",
    "read_info",
    "read_safetensors",
    "save_component",
    "save_diffusers",
    "save_single_file",
    "scheduler_config",
    "write_safetensors",
]

ModelPath = PathLike | Checkpoint
"""A folder or file, or a single file that was opened before."""


def read_info(path: ModelPath, prediction_type: str | None = None) -> ModelInfo:
    """Family, prediction type and noise schedule, from a folder's scheduler configuration or from a single file.

    Args:
        path: a diffusers folder, a U-Net's own folder, or a single file.
        prediction_type: overrides what the model says of itself.
    """
    root = _open(path)
    if isinstance(root, Path):
        folder = _component_folder(root, "unet")
        family = _family_of_config(weights.read_json(folder / "config.json"))
        file = folder.parent / "scheduler" / "scheduler_config.json"
        stated = weights.read_json(file) if file.is_file() else {}
    else:
        family, file, stated = root.family, root.path, root.scheduler()
    info = _info(family, stated, file)
    return replace(info, prediction_type=prediction_type) if prediction_type else info


def list_components(path: ModelPath) -> list[str]:
    """Names of the networks that a diffusers folder or a single file holds."""
    root = _open(path)
    if isinstance(root, Path):
        return [name for name in COMPONENTS if (root / name / "config.json").is_file()]
    return root.names


def read_component(path: ModelPath, name: str) -> Component:
    """One network of a model.

    Args:
        path: a diffusers folder; one network's own folder; a single file with the whole model; or a file with this
            network alone, in either layout.
        name: "unet", "vae", "text_encoder" or "text_encoder_2".

    Raises:
        InputError: the model has no such network, or a file of it cannot be read, or its configuration says what no
            network can be.
    """
    root = _open(path)
    if not isinstance(root, Path):
        return root.take(name)
    folder = _component_folder(root, name)
    file = folder / "config.json"
    config = Config(weights.read_json(file), str(file))
    check_config(config, str(file))
    tensors = dequantise(weights.read_folder(folder), str(folder))
    return Component(modern(name, tensors), config, str(folder))


def _open(path: ModelPath) -> Path | Checkpoint:
    """A folder's path, or a single file opened."""
    if isinstance(path, Checkpoint):
        return path
    return Path(path) if Path(path).is_dir() else Checkpoint(path)


def _component_folder(root: Path, name: str) -> Path:
    if (root / name).is_dir():
        return root / name
    if (root / "config.json").is_file():
        return root
    held = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
    raise InputError(f"{root} has no {name} folder (it has: {held}); give a diffusers folder or a single file")


def info_from_configs(unet: Mapping[str, Any], scheduler: Mapping[str, Any], source: PathLike) -> ModelInfo:
    """What the configurations of a U-Net and of a scheduler say of a model.

    Args:
        source: named in errors.

    Raises:
        InputError: a value that no schedule can have.
    """
    return _info(_family_of_config(unet), scheduler, Path(source))


def _family_of_config(unet: Mapping[str, Any]) -> Family:
    if unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def _info(family: Family, scheduler: Mapping[str, Any], source: Path) -> ModelInfo:
    names = {"zero_terminal_snr": "rescale_betas_zero_snr"}
    fields = (f for f in ModelInfo.__dataclass_fields__ if f != "family")
    stated = {f: scheduler[names.get(f, f)] for f in fields if scheduler.get(names.get(f, f)) is not None}
    check_scheduler(stated, source)
    if "trained_betas" in stated:
        stated["trained_betas"] = tuple(map(float, stated["trained_betas"]))
        stated["num_train_timesteps"] = len(stated["trained_betas"])
    return ModelInfo(family, **stated)
