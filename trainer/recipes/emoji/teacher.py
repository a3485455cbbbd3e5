"""The recipe's teacher: a U-Net in Stable Diffusion 1.x's shape, trained together with the text encoder."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcm_core.diffusion.consistency import add_noise, prediction_target
from lcm_core.diffusion.schedule import get_alphas_cumprod
from lcm_core.networks.unet import set_attention
from trainer.loop import LoopConfig, train
from trainer.recipes.emoji import Network
from trainer.recipes.emoji.data import Drawings
from trainer.recipes.emoji.words import CONTEXT_WIDTH, build_text_encoder, tokenize

CAPTION_DROPOUT = 0.1
"""Share of the captions left empty, for classifier-free guidance (arXiv 2207.12598)."""
MIN_SNR_GAMMA = 5.0
PREDICTION_TYPE = "v_prediction"
"""With epsilon the error at the last timestep counts 14.6-fold in x0, which a U-Net as small as this cannot meet."""


def build_unet(**overrides: Any) -> Network:
    """An untrained U-Net: Stable Diffusion 1.x's blocks at a tenth of its width, so that LoRA names fit both."""
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 128, 128),
        "layers_per_block": 2,
        "attention_head_dim": 2,  # diffusers' name for the number of heads here
        "cross_attention_dim": CONTEXT_WIDTH,
        "norm_num_groups": 32,
    }
    unet: Network = UNet2DConditionModel(**(settings | overrides))
    set_attention(unet, "bmm")
    return unet


@dataclass(frozen=True)
class CaptionedLatents:
    """Latents of the drawings that may be trained on, normalised, with what is needed to caption them."""

    latents: Tensor  # (N, 4, h, w)
    drawings: Drawings
    seen: Tensor  # (N,) their numbers in `drawings`
    tokenizer: Any

    def batch(self, size: int, generator: torch.Generator, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Random latents (B, 4, h, w) and their captions' tokens (B, 77), a share `dropout` of them empty."""
        chosen = torch.randint(len(self.seen), (size,), generator=generator)
        kept = torch.rand(size, generator=generator) >= dropout
        captions = [
            self.drawings.entries[i].caption(generator) if keep else ""
            for i, keep in zip(self.seen[chosen].tolist(), kept.tolist(), strict=True)
        ]
        return self.latents[chosen], tokenize(self.tokenizer, captions)


def train_teacher(data: CaptionedLatents, config: LoopConfig, folder: Path, device: torch.device) -> dict[str, Network]:
    """Train U-Net and text encoder to predict v. Returns both, averaged: "unet" and "text_encoder"."""
    networks = {"unet": build_unet(), "text_encoder": build_text_encoder(len(data.tokenizer))}
    model = nn.ModuleDict(networks).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    alphas_cumprod = get_alphas_cumprod().float()

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        x0, tokens = data.batch(config.batch_size, generator, CAPTION_DROPOUT)
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randint(len(alphas_cumprod), (len(x0),), generator=generator)
        abar = alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = add_noise(x0, eps, abar).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            context = model["text_encoder"](tokens.to(device)).last_hidden_state
            predicted = model["unet"](x_t, t.to(device), context).sample
        aim = prediction_target(x0, eps, abar, PREDICTION_TYPE).to(device)
        error = (predicted.float() - aim).square().mean((1, 2, 3))
        return (error * min_snr_weight(abar.flatten()).to(device)).mean()

    train(model, loss_fn, config, folder, ema)
    return dict(ema.items())


def min_snr_weight(abar: Tensor) -> Tensor:
    """min(SNR, gamma) / SNR with SNR = abar / (1 - abar), Min-SNR's limit on nearly clean samples (arXiv 2303.09556).

    On v it leaves the noisy samples their full weight, where the paper's min(SNR, gamma) / (SNR + 1) drops them: few
    steps stand or fall with the first guess from pure noise.
    """
    snr = abar / (1 - abar)
    return snr.clamp(max=MIN_SNR_GAMMA) / snr
