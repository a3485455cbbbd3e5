"""The recipe's students: a full LCM that reads guidance as a number, and an LCM-LoRA, from the same teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lcm_core.adapters import LoraAdapters, add_lora, lora_state_dict
from lcm_core.guidance import guidance_embedding
from lcm_core.schedule import get_alphas_cumprod
from lcm_core.unet import exact_output
from trainer.emoji import Network
from trainer.emoji.teacher import CaptionedLatents, build_unet
from trainer.emoji.words import tokenize
from trainer.lcd import LCDConfig, Student, Teacher, lcd_loss
from trainer.loop import LoopConfig, LossFunction, train

GUIDANCE_WIDTH = 256


def as_teacher(unet: Network) -> Teacher:
    def call(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return unet(x, t, context).sample.float()

    return call


def as_student(unet: Network) -> Student:
    """A U-Net with `cond_proj` reads w; one without (a LoRA's) was made for one w and is not told."""
    width = unet.config.time_cond_proj_dim

    def call(x: Tensor, t: Tensor, context: Tensor, w: Tensor) -> Tensor:
        condition = None if width is None else guidance_embedding(w, width)
        return unet(x, t, context, timestep_cond=condition).sample.float()

    return call


def full_student(teacher_unet: Network) -> Network:
    """The teacher with a guidance input that at first changes nothing."""
    unet = build_unet(time_cond_proj_dim=GUIDANCE_WIDTH)
    missing, unexpected = unet.load_state_dict(teacher_unet.state_dict(), strict=False)
    if missing != ["time_embedding.cond_proj.weight"] or unexpected:
        raise ValueError(f"teacher and student differ: missing {missing}, unexpected {unexpected}")
    nn.init.zeros_(unet.time_embedding.cond_proj.weight)
    exact_output(unet)
    return unet


def distil_full(
    data: CaptionedLatents,
    teacher: Mapping[str, Network],
    lcd: LCDConfig,
    config: LoopConfig,
    folder: Path,
    device: torch.device,
) -> Network:
    """Latent consistency distillation of the whole U-Net. The target network is the average, and the result."""
    exact_output(teacher["unet"])
    online = full_student(teacher["unet"]).to(device)
    target = copy.deepcopy(online).requires_grad_(False)
    networks = as_student(online), as_student(target), as_teacher(teacher["unet"].to(device))
    loss_fn = distillation_loss(data, networks, teacher["text_encoder"].to(device), lcd, config, device)
    train(online, loss_fn, config, folder, target)
    return target


def distillation_loss(
    data: CaptionedLatents,
    networks: tuple[Student, Student, Teacher],
    text_encoder: Network,
    lcd: LCDConfig,
    config: LoopConfig,
    device: torch.device,
) -> LossFunction:
    """`loss_fn(step, generator)` for the loop: a batch of captioned latents through the LCD loss."""
    alphas_cumprod = get_alphas_cumprod().float().to(device)
    with torch.no_grad():
        null_context = text_encoder(tokenize(data.tokenizer, [""]).to(device)).last_hidden_state

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        x0, tokens = data.batch(config.batch_size, generator)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                context = text_encoder(tokens.to(device)).last_hidden_state
            return lcd_loss(*networks, x0.to(device), context, null_context, alphas_cumprod, lcd, generator)

    return loss_fn


def distil_lora(
    data: CaptionedLatents,
    teacher: Mapping[str, Network],
    lcd: LCDConfig,
    config: LoopConfig,
    rank: int,
    folder: Path,
    device: torch.device,
) -> dict[str, Tensor]:
    """Latent consistency distillation into a LoRA (arXiv 2311.05556), in kohya's layout.

    One U-Net is in memory: the teacher is it with the adapters off, the online student with them on, and the target
    with their average.
    """
    unet = copy.deepcopy(teacher["unet"]).to(device)
    exact_output(unet)
    adapters = add_lora(unet, rank)
    adapters.start_ema()

    def student(which: Literal["online", "ema"]) -> Student:
        call = as_student(unet)

        def run(x: Tensor, t: Tensor, context: Tensor, w: Tensor) -> Tensor:
            with adapters.using(which):
                return call(x, t, context, w)

        return run

    def original(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        with adapters.using("off"):
            return as_teacher(unet)(x, t, context)

    networks = student("online"), student("ema"), original
    loss_fn = distillation_loss(data, networks, teacher["text_encoder"].to(device), lcd, config, device)
    train(_halves(adapters, ema=False), loss_fn, config, folder, _halves(adapters, ema=True))
    return lora_state_dict(unet, ema=True, dtype=torch.float16)


def _halves(adapters: LoraAdapters, ema: bool) -> nn.ModuleDict:
    """The adapters' trained halves, or their averages, under the same names."""
    return nn.ModuleDict(
        {path.replace(".", "_"): nn.ModuleList(layer.halves(ema)) for path, layer in adapters.layers.items()}
    )
