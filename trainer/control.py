"""A ControlNet, T2I-Adapter or IP-Adapter in a distillation: teacher and student are asked with it alike.

Each call of a network comes with its own noisy latents, timestep and text, so that a ControlNet is asked in each; a
T2I-Adapter sees the picture alone, and what an IP-Adapter makes of it is in the cache. None of them is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.cli.common import parse_lora
from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_folder, read_safetensors
from lcm_core.networks.control import Control, controlled, load_control
from lcm_core.networks.cross_attention import Attended, attending
from lcm_core.networks.ip_adapter import IPAdapter
from lcm_core.networks.unet import UNet
from lcm_core.pipeline.sources import ModelSource, find_control
from trainer.config import DistillConfig
from trainer.data.batches import HINT, PICTURE_TOKENS, LatentCache
from trainer.data.cache import EMOJI
from trainer.data.hashing import hash_tensors
from trainer.data.index import find_index
from trainer.data.teacher import Teacher

_LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey, as pictures are made grey elsewhere."""
_BESIDE_ATTENTION = ("gradient_checkpointing", "compile", "sharded", "base_dtype", "offload")
"""Settings of the student under which layers run another time, or in another way, than they are called."""


class ControlledUNet(UNet):
    """A U-Net to whose conditioning belongs `hint`, the pictures (B, 3, H, W) in [0, 1] that its control looks at."""

    def __init__(self, unet: UNet, control: Control, strength: float) -> None:
        super().__init__(unet.model)
        self.control, self.strength = control, strength

    def __call__(self, x: Tensor, t: Tensor, *, hint: Tensor, **cond: Any) -> Tensor:  # type: ignore[override]
        """As a `UNet`, with what the control adds, through which no gradient goes."""
        if self.control.channels == 1:
            hint = (hint * torch.tensor(_LUMA, device=hint.device).view(3, 1, 1)).sum(1, keepdim=True)

        @torch.no_grad()
        def residuals(*asked: Any) -> dict[str, list[Tensor]]:
            return self.control.guide(hint, self.strength)(*asked)

        output: Tensor = controlled(super().__call__, [residuals])(x, t, **cond)
        return output


class AttendingUNet(UNet):
    """A U-Net to whose conditioning belongs `picture_tokens`, what an IP-Adapter makes of pictures."""

    def __init__(self, unet: UNet, adapter: IPAdapter, strength: float) -> None:
        super().__init__(unet.model)
        self.plain, self.attended = unet, Attended(pictures=[(adapter.keys, strength)])

    def __call__(self, *args: Any, **cond: Any) -> Tensor:
        """As `lcm_core.networks.cross_attention.attending` says."""
        output: Tensor = self.network(*args, **cond)
        return output

    @cached_property
    def network(self) -> Callable[..., Tensor]:
        """Made at the first call: the layers have their LoRA then."""
        return attending(self.plain, self.attended)


def open_control(config: DistillConfig, source: ModelSource) -> Callable[[Any], Any]:
    """What puts a run's control on its U-Nets, which share it; without a control they stay as they are.

    Raises:
        InputError: where it is called; the control is broken, or for a U-Net of other widths.
    """
    if not config.control:
        return lambda network: network
    path, strength = parse_lora(config.control)
    control: Control | IPAdapter | None = None

    def put_on(unet: UNet) -> UNet:
        nonlocal control
        if control is None:
            control = load_control(find_control(path, source.root), unet, source.root)
        kind: Any = AttendingUNet if isinstance(control, IPAdapter) else ControlledUNet
        guided: UNet = kind(unet, control, strength)
        return guided

    return put_on


def check_control(config: DistillConfig, teacher: Teacher) -> None:
    """Refuse a control that cannot be there, or that has nothing to look at.

    Raises:
        InputError: says what to give.
    """
    data, student = config.data, config.student
    if not config.control:
        if data.control_pictures:
            raise InputError("control_pictures were given, but no control; give --control, or leave them out")
        return
    if teacher.source.family is not None:
        raise InputError(f"control is for Stable Diffusion's U-Nets, not for {teacher.name}; leave it out")
    if data.is_image_free or data.path == EMOJI:
        raise InputError(f"control {config.control} needs pictures; give a folder of them as data")
    if teacher.ip_adapter is not None:
        odd = [name for name in _BESIDE_ATTENTION if getattr(student, name)]
        if odd:
            raise InputError(
                f"control {config.control} is an IP-Adapter, which changes the layers of attention while they run; "
                f"leave {odd[0]} out"
            )
    elif not data.control_pictures and find_index(Path(data.path)) is None:
        raise InputError(
            f"control {config.control} has nothing to look at; give --control-pictures, a folder with a picture for "
            "each picture of the data"
        )


def check_guide(config: DistillConfig, teacher: Teacher, cache: LatentCache) -> None:
    """Refuse a finished cache that was made for another kind of control, or for none, or for one where there is none.

    Raises:
        InputError: says what it was made for.
    """
    wanted = "" if not config.control else HINT if teacher.ip_adapter is None else PICTURE_TOKENS
    if wanted == cache.guide:
        return
    made = {"": "no control", HINT: "a ControlNet or T2I-Adapter", PICTURE_TOKENS: "an IP-Adapter"}[cache.guide]
    raise InputError(f"the cache {config.data.path} was made for {made}; give --control as it was made for")


def hash_control(config: DistillConfig, source: ModelSource) -> str:
    """A hash of the weights of a run's control."""
    return hash_tensors(_weights(config, source))


def control_size(config: DistillConfig, source: ModelSource) -> int:
    """Numbers in a run's control; 0 without one."""
    return sum(tensor.numel() for tensor in _weights(config, source).values()) if config.control else 0


def _weights(config: DistillConfig, source: ModelSource) -> dict[str, Tensor]:
    path = find_control(parse_lora(config.control)[0], source.root)
    return read_folder(path) if path.is_dir() else read_safetensors(path)[0]
