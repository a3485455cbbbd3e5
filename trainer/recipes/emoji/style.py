"""A style LoRA: the teacher learns, from its drawings alone, the one style that was kept from it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcm_core.networks.lora_layers import lora_state_dict
from lcm_core.networks.unet import exact_output
from trainer.config import LoopConfig, StudentConfig
from trainer.data.prefetch import Prefetch
from trainer.loop import step_generator, train
from trainer.recipes.emoji import AnyModule
from trainer.recipes.emoji.compute import precision
from trainer.recipes.emoji.latents import CaptionedLatents
from trainer.recipes.emoji.teacher import CAPTION_DROPOUT, LATE_SIZES, NoisedBatch, add_noise, diffusion_loss
from trainer.students import lora_student, unet_network


def train_style(
    data: CaptionedLatents,
    teacher: Mapping[str, AnyModule],
    config: LoopConfig,
    rank: int,
    folder: Path,
    device: torch.device,
    workers: int = 0,
) -> dict[str, Tensor]:
    """Train a LoRA on the teacher with the teacher's own loss. Returns its tensors in kohya's layout.

    Args:
        data: drawings of the style.
    """
    unet, text_encoder = copy.deepcopy(teacher["unet"]).to(device), teacher["text_encoder"].to(device)
    exact_output(unet)
    student = lora_student(unet, unet_network(unet, precision(device)), StudentConfig(rank=rank))

    def predict(x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            context = text_encoder(tokens).last_hidden_state
        return student.networks.online(x_t, t, {"encoder_hidden_states": context}, None)

    def draw(step: int) -> NoisedBatch:
        generator = step_generator(config.seed, step)
        size = data.choose_size(LATE_SIZES, generator)
        return add_noise(*data.batch(config.batch_size, size, generator, CAPTION_DROPOUT), generator)

    batches = Prefetch(draw, config.steps, workers)
    train(
        student.trained,
        lambda step, _: diffusion_loss(predict, batches(step), device),
        config,
        folder,
        student.average,
    )
    return lora_state_dict(unet, ema=True, dtype=torch.float16)
