"""What a student may start from, its teacher or something in that place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lcm_core.diffusion.flow_map import END_KEY
from lcm_core.errors import InputError
from lcm_core.families.guidance_input import guidance_weights
from lcm_core.files.checkpoint import Component, read_component
from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks.lora_layers import TARGET_MODULES, add_lora, check_lora_state_dict
from lcm_core.pipeline.sources import ModelSource, find_source
from trainer.config import DistillConfig, StudentConfig
from trainer.methods.config import FlowMapConfig


def check_flow_map(config: DistillConfig, source: ModelSource) -> None:
    """Refuse a flow map of what cannot become one, and a flow map as what is not told where a jump ends.

    Raises:
        InputError: says what to choose.
    """
    wanted = config.method.kind == FlowMapConfig.kind
    if wanted and config.student.kind != "full":
        raise InputError(
            "method flowmap is for full students: a LoRA cannot be told where a jump ends; give --student full, or "
            "--method tcd"
        )
    if wanted and source.family is not None:
        raise InputError(f"method flowmap is for Stable Diffusion's U-Nets so far, not for {source.root}; use tcd")
    start = config.student.start if config.student.kind == "full" else ""
    models = {"teacher": source} | ({"start": find_source(start)} if start else {})
    for name, model in models.items():
        is_flow_map = END_KEY in read_component(model.unet, "unet").config
        if is_flow_map and not (wanted and name == "start"):
            raise InputError(
                f"{name} {model.root} is a flow map, which only students of --method flowmap can start from"
            )


def check_lora_start(start: Path, teacher: Component, config: StudentConfig) -> None:
    """Refuse a LoRA that a LoRA student of this teacher cannot start from; no weights are loaded.

    Raises:
        InputError: unreadable, of other layers, or of another rank.
    """
    from diffusers import UNet2DConditionModel

    tensors, _ = read_safetensors(start)
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(plain_config(teacher.config))
        add_lora(unet, config.rank, config.alpha or None, config.target_modules or TARGET_MODULES)
    try:
        check_lora_state_dict(unet, tensors)
    except InputError as error:
        raise InputError(f"start {start}: {error}") from error


def with_guidance(component: Component, embedding_dim: int, end_dim: int = 0) -> Component:
    """A network's weights, copied to float32, with `cond_proj` for the guidance embedding at zero where it has none.

    Args:
        component: the network.
        embedding_dim: width of the guidance embedding, where it has none.
        end_dim: width of the embedding of a jump's end, where it has none; behind the other, at zero too.
    """
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in component.tensors.items()}
    stated = next((t.shape[1] for name, t in tensors.items() if name.endswith("cond_proj.weight")), None)
    if stated is None:
        stated = embedding_dim
        tensors |= guidance_weights(tensors, embedding_dim)
    config = {**plain_config(component.config), "time_cond_proj_dim": stated}
    if end_dim and not config.get(END_KEY):
        for name in [name for name in tensors if name.endswith("cond_proj.weight")]:
            tensors[name] = functional.pad(tensors[name], (0, end_dim))
        config |= {"time_cond_proj_dim": stated + end_dim, END_KEY: end_dim}
    return Component(tensors, config, component.source)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A network's configuration without diffusers' notes to itself, of which one would reset changed values."""
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return {"_class_name": config.get("_class_name", "UNet2DConditionModel"), **plain}
