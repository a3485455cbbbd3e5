"""The recipe's students: a full LCM that reads guidance as a number, and an LCM-LoRA, from the same teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcm_core.files.checkpoint import Component
from lcm_core.networks.lora_layers import lora_state_dict
from lcm_core.networks.unet import exact_output
from trainer.config import LoopConfig, StudentConfig
from trainer.data.cache import Batch
from trainer.distill import distill
from trainer.methods.config import MethodConfig
from trainer.recipes.emoji import AnyModule
from trainer.recipes.emoji.compute import precision
from trainer.recipes.emoji.latents import CaptionedLatents
from trainer.recipes.emoji.teacher import DIFFUSION, LATE_SIZES
from trainer.recipes.emoji.words import tokenize
from trainer.students import Student, full_student, lora_student, prepare_unet, unet_network


@dataclass(frozen=True)
class EncodedCaptions:
    """The drawings with captions in varied words, which are encoded as they are drawn."""

    data: CaptionedLatents
    text_encoder: AnyModule

    def draw(self, size: int, generator: torch.Generator, caption_dropout: float = 0.0) -> list[tuple[Tensor, Tensor]]:
        """Random latents, all of one size of picture, each with its caption's tokens."""
        pixels = self.data.choose_size(LATE_SIZES, generator)
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
) -> AnyModule:
    """Latent consistency distillation of the whole U-Net. The target network is the average, and the result."""
    unet = teacher["unet"].to(device)
    exact_output(unet)
    prepare_unet(unet, StudentConfig(), (data.largest // 8, data.largest // 8))
    component = Component(unet.state_dict(), dict(unet.config))
    dtype = precision(device)
    student = full_student(component, unet_network(unet, dtype), StudentConfig(), dtype, device)
    for network in (student.trained, student.average):
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
) -> dict[str, Tensor]:
    """Latent consistency distillation into a LoRA (arXiv 2311.05556), in kohya's layout."""
    unet = copy.deepcopy(teacher["unet"]).to(device)
    exact_output(unet)
    prepare_unet(unet, StudentConfig(), (data.largest // 8, data.largest // 8))
    student = lora_student(unet, unet_network(unet, precision(device)), StudentConfig(rank=rank))
    _distil(student, data, teacher, method, config, folder)
    return lora_state_dict(unet, ema=True, dtype=torch.float16)


def _distil(
    student: Student,
    data: CaptionedLatents,
    teacher: Mapping[str, AnyModule],
    method: MethodConfig,
    config: LoopConfig,
    folder: Path,
) -> None:
    source = EncodedCaptions(data, teacher["text_encoder"].to(next(student.trained.parameters()).device))
    distill(student, source, DIFFUSION, method, config, folder, graphs=True)
