"""The head with which a student's critic tells real pictures from the student's, see `trainer.methods.gan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lcm_core.errors import InputError
from lcm_core.pipeline.sources import ModelSource
from trainer.config import DistillConfig
from trainer.methods.config import MethodConfig
from trainer.methods.gan import discriminator_on, make_head
from trainer.students import Student

_NAME = "gan_head"


def has_discriminator(method: MethodConfig) -> bool:
    """Whether a method's settings ask for one."""
    return getattr(method, "gan_weight", 0.0) > 0


def check_discriminator(config: DistillConfig, source: ModelSource, precision: torch.dtype) -> None:
    """Refuse what does not go with a discriminator.

    Raises:
        InputError: says what to leave out.
    """
    if not has_discriminator(config.method):
        return
    weight = f"gan_weight {config.method.gan_weight:g}"  # type: ignore[attr-defined]
    if config.data.is_image_free:
        raise InputError(f"{weight} needs real pictures, and there are prompts alone; give --data, or leave it out")
    if source.family is not None and source.family.folder != "unet":
        raise InputError(f"{weight} is for U-Nets, not for the transformer of {source.root}; leave it out")
    if precision == torch.float16:
        raise InputError(f"{weight} does not go with precision float16; choose float32 or bfloat16")
    if config.student.sharded or config.student.compile:
        other = "sharded" if config.student.sharded else "compile"
        raise InputError(f"{other} does not go with {weight}; leave one of them out")


def head_weights(method: MethodConfig, unet: Mapping[str, Any]) -> int:
    """Numbers in the head on a U-Net of this configuration; 0 where the method has none."""
    if not has_discriminator(method):
        return 0
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_head(unet["block_out_channels"][-1]).parameters())


def add_discriminator(student: Student) -> Student:
    """A student whose critic has a head, which is trained and saved with it, and is no part of what is exported.

    Raises:
        InputError: the critic is no U-Net with a middle block.
    """
    critic: Any = student.critic
    assert critic is not None
    unet: Any = critic if student.adapters is None else student.unet
    block = getattr(unet, "mid_block", None)
    if not isinstance(block, nn.Module):
        raise InputError("gan_weight is for U-Nets with a middle block, which this network has not; leave it out")
    head = make_head(unet.config["block_out_channels"][-1]).to(next(unet.parameters()).device)
    critic.add_module(_NAME, head)
    discriminator = discriminator_on(student.networks.critic, block, head)
    return replace(student, networks=student.networks._replace(discriminator=discriminator))
