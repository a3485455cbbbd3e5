"""What a student may start from in the place of its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import Component
from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks.lora_layers import TARGET_MODULES, add_lora, check_lora_state_dict
from trainer.config import StudentConfig
from trainer.students import plain_config


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
