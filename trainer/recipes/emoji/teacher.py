"""The recipe's teacher: a U-Net in Stable Diffusion 1.x's shape, trained together with the text encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.networks.unet import set_attention
from trainer.cuda_graphs import graphed
from trainer.data.prefetch import Prefetch
from trainer.loop import LoopConfig, step_generator, train
from trainer.recipes.emoji import AnyModule
from trainer.recipes.emoji.compute import autocast, place
from trainer.recipes.emoji.latents import CaptionedLatents
from trainer.recipes.emoji.words import CONTEXT_WIDTH, build_text_encoder

CAPTION_DROPOUT = 0.1
"""Share of the captions left empty, for classifier-free guidance (arXiv 2207.12598)."""
EARLY_SIZES = {64: 0.7, 96: 0.1, 128: 0.2}
"""Shares of the steps for each size of picture; small ones cost a quarter and teach what things look like."""
LATE_SIZES = {64: 0.25, 96: 0.15, 128: 0.6}
"""The same for the last `LATE_SHARE` of the steps."""
LATE_SHARE = 0.3
MIN_SNR_GAMMA = 5.0
PREDICTION_TYPE = "v_prediction"
"""What the network predicts: with epsilon the error at the last timestep counts 14.6-fold in x0, which a U-Net as small
as this cannot meet."""
DIFFUSION = Diffusion(prediction_type=PREDICTION_TYPE)


def build_unet(**overrides: Any) -> AnyModule:
    """An untrained U-Net: Stable Diffusion 1.x's blocks, a fifth as wide and less, so that LoRA names fit both."""
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (64, 128, 128, 128),  # whole multiples of the first, as hosts write them
        "layers_per_block": 2,
        "attention_head_dim": 2,  # diffusers' name for the number of heads here
        "cross_attention_dim": CONTEXT_WIDTH,
        "norm_num_groups": 32,
    }
    unet: AnyModule = UNet2DConditionModel(**(settings | overrides))
    set_attention(unet, "bmm")
    return unet


def train_teacher(
    data: CaptionedLatents, config: LoopConfig, folder: Path, device: torch.device, workers: int = 0
) -> dict[str, AnyModule]:
    """Train U-Net and text encoder to predict v. Returns both, averaged: "unet" and "text_encoder"."""
    networks = {"unet": build_unet(), "text_encoder": build_text_encoder(len(data.tokenizer))}
    if device.type == "cuda":
        networks["text_encoder"].set_attn_implementation("sdpa")  # "eager" copies to the GPU, which no graph may
    model = place(nn.ModuleDict(networks), device)
    ema = copy.deepcopy(model).requires_grad_(False)

    def predict(x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        context = model["text_encoder"](tokens).last_hidden_state
        output: Tensor = model["unet"](x_t, t, context).sample
        return output

    def draw(step: int) -> NoisedBatch:
        generator = step_generator(config.seed, step)
        late = step >= config.steps * (1 - LATE_SHARE)
        size = data.choose_size(LATE_SIZES if late else EARLY_SIZES, generator)
        count = max(1, round(config.batch_size * (data.smallest / size) ** 2))
        return add_noise(*data.batch(count, size, generator, CAPTION_DROPOUT), generator)

    def loss_of(*tensors: Tensor) -> Tensor:
        return diffusion_loss(predict, NoisedBatch(*tensors), device)

    batches, loss = Prefetch(draw, config.steps, workers), graphed(loss_of, model.parameters(), device)
    train(model, lambda step, _: loss(*batches(step)), config, folder, ema)
    return dict(ema.items())


class NoisedBatch(NamedTuple):
    """What one step of the diffusion loss needs, on the CPU."""

    x_t: Tensor
    """Noised latents (B, 4, h, w)."""
    t: Tensor
    """Timesteps (B,)."""
    tokens: Tensor
    """The tokens of the captions, (B, 77)."""
    target: Tensor
    """The v that is to be predicted, (B, 4, h, w)."""
    weight: Tensor
    """The weight of each sample's error, (B,)."""


def add_noise(x0: Tensor, tokens: Tensor, generator: torch.Generator) -> NoisedBatch:
    """Latents (B, 4, h, w) and captions (B, 77) at random timesteps."""
    eps = torch.randn(x0.shape, generator=generator)
    t = DIFFUSION.process.draw(len(x0), generator)
    weight = min_snr_weight(DIFFUSION.snr(t)).float()
    return NoisedBatch(DIFFUSION.noise(x0, eps, t), t, tokens, DIFFUSION.target(x0, eps, t), weight)


def diffusion_loss(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor], batch: NoisedBatch, device: torch.device
) -> Tensor:
    """Weighted squared error of the predicted v; a scalar.

    Args:
        predict: (x_t (B, 4, h, w), t (B,), tokens (B, 77)), all on the device -> v (B, 4, h, w).
    """
    x_t, t, tokens, target, weight = (tensor.to(device) for tensor in batch)
    with autocast(device):
        predicted = predict(x_t, t, tokens)
    return ((predicted.float() - target).square().mean((1, 2, 3)) * weight).mean()


def min_snr_weight(snr: Tensor) -> Tensor:
    """min(SNR, gamma) / SNR, (B,) -> (B,): Min-SNR's limit on nearly clean samples (arXiv 2303.09556).

    On v it leaves the noisy samples their full weight, where the paper's min(SNR, gamma) / (SNR + 1) drops them: few
    steps stand or fall with the first guess from pure noise.
    """
    return snr.clamp(max=MIN_SNR_GAMMA) / snr
