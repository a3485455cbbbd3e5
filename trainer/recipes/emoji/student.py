"""The recipe's students: a full LCM that reads guidance as a number, and an LCM-LoRA, from the same teacher.

Each is trained twice: by latent consistency distillation, and from there by distribution matching, after which more of
its pictures show what was asked for, though they are further from the drawings. The average of the weights keeps both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcm_core.files.checkpoint import Component
from lcm_core.files.lora import merge, read_lora
from lcm_core.networks.lora_layers import lora_state_dict
from lcm_core.networks.unet import exact_output
from trainer.config import LoopConfig, StudentConfig
from trainer.data.cache import Batch
from trainer.discriminator import add_discriminator, has_discriminator
from trainer.distill import distill
from trainer.methods.config import MethodConfig
from trainer.methods.method import get_method
from trainer.recipes.emoji import AnyModule
from trainer.recipes.emoji.compute import precision
from trainer.recipes.emoji.latents import CaptionedLatents
from trainer.recipes.emoji.teacher import DIFFUSION, LATE_SIZES
from trainer.recipes.emoji.words import tokenize
from trainer.starts import with_guidance
from trainer.students import Student, full_student, lora_student, prepare_unet, unet_network

MATCHING_SIZES = {64: 0.1, 96: 0.1, 128: 0.8}
"""Shares of the steps of distribution matching for each size of picture."""


@dataclass(frozen=True)
class EncodedCaptions:
    """The drawings with captions in varied words, which are encoded as they are drawn."""

    data: CaptionedLatents
    text_encoder: AnyModule
    sizes: Mapping[int, float]
    """Shares of the steps for each size of picture."""

    def draw(self, size: int, generator: torch.Generator, caption_dropout: float = 0.0) -> list[tuple[Tensor, Tensor]]:
        """Random latents, all of one size of picture, each with its caption's tokens."""
        pixels = self.data.choose_size(self.sizes, generator)
        return list(zip(*self.data.batch(size, pixels, generator, caption_dropout), strict=True))

    def read(self, picks: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        """The samples that were drawn, with the captions encoded."""
        latents, tokens = (torch.stack(column) for column in zip(*picks, strict=True))
        null = self._encode(tokenize(self.data.tokenizer, [""])).expand(len(latents), -1, -1)
        return Batch(latents, {"encoder_hidden_states": self._encode(tokens)}, {"encoder_hidden_states": null})

    @torch.no_grad()
    def _encode(self, tokens: Tensor) -> Tensor:
        context: Tensor = self.text_encoder(tokens.to(self.text_encoder.device)).last_hidden_state
        return context


def distil_full(
    data: CaptionedLatents,
    teacher: Mapping[str, AnyModule],
    method: MethodConfig,
    config: LoopConfig,
    folder: Path,
    device: torch.device,
    start: Component | None = None,
) -> AnyModule:
    """Distil the whole U-Net, from the teacher or from a student. The target network is the average, and the result."""
    unet = teacher["unet"].to(device)
    exact_output(unet)
    component = Component(unet.state_dict(), dict(unet.config))
    dtype, critic = precision(device), get_method(method).needs_critic
    student = full_student(
        component, unet_network(unet, dtype), StudentConfig(), dtype, device, with_critic=critic, start=start
    )
    for network in (unet, student.trained, student.average, student.critic):
        if network is not None:
            prepare_unet(network, StudentConfig(), (data.largest // 8, data.largest // 8))
    _distil(student, data, teacher, method, config, folder)
    return student.average


def distil_lora(
    data: CaptionedLatents,
    teacher: Mapping[str, AnyModule],
    method: MethodConfig,
    config: LoopConfig,
    rank: int,
    folder: Path,
    device: torch.device,
    start: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Distil into a LoRA (arXiv 2311.05556), a new one or `start`. Returns it in kohya's layout."""
    unet = copy.deepcopy(teacher["unet"]).to(device)
    exact_output(unet)
    prepare_unet(unet, StudentConfig(), (data.largest // 8, data.largest // 8))
    network, critic = unet_network(unet, precision(device)), get_method(method).needs_critic
    student = lora_student(unet, network, StudentConfig(rank=rank), with_critic=critic, start=start)
    if has_discriminator(method):
        student = add_discriminator(student)
    _distil(student, data, teacher, method, config, folder)
    return lora_state_dict(unet, ema=True, dtype=torch.float16)


def merged(teacher: AnyModule, lora: Mapping[str, Tensor]) -> Component:
    """The teacher's U-Net with a LoRA merged, as a full student that does not read guidance yet."""
    unet = copy.deepcopy(teacher)
    merge(unet, [(read_lora(lora), 1.0)], keep_originals=False)
    return with_guidance(Component(unet.state_dict(), dict(unet.config)), StudentConfig().guidance_embedding_dim)


def average(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights `share` of the way from the first to the second.

    The average of two students of one teacher paints better than either (model soups, arXiv 2203.05482).
    """
    return {name: torch.lerp(weight, second[name].to(weight), share) for name, weight in first.items()}


def _distil(
    student: Student,
    data: CaptionedLatents,
    teacher: Mapping[str, AnyModule],
    method: MethodConfig,
    config: LoopConfig,
    folder: Path,
) -> None:
    has_critic = student.critic is not None
    text_encoder = teacher["text_encoder"].to(next(student.trained.parameters()).device)
    source = EncodedCaptions(data, text_encoder, MATCHING_SIZES if has_critic else LATE_SIZES)
    distill(student, source, DIFFUSION, method, config, folder, graphs=not has_critic)
