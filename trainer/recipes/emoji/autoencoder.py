"""The recipe's VAE: an AutoencoderKL in Stable Diffusion's layout, small."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lcm_core.networks.unet import set_attention
from trainer.loop import LoopConfig, train
from trainer.recipes.emoji import Network
from trainer.recipes.emoji.data import Drawings

SCALING_FACTOR = 0.18215
"""Stable Diffusion 1.x's. Hosts hard-code it, so the latents are brought to it instead of the other way round."""
KL_WEIGHT = 1e-6
SQUARED_WEIGHT = 5.0
EDGE_WEIGHT = 0.25


def build_vae() -> Network:
    """An untrained AutoencoderKL: 8 pixels a latent, 4 channels."""
    from diffusers import AutoencoderKL

    blocks = 4
    vae: Network = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=SCALING_FACTOR,
    )
    set_attention(vae, "bmm")
    return vae


def train_vae(drawings: Drawings, config: LoopConfig, folder: Path, device: torch.device) -> Network:
    """Train on the drawings that are not held out. Returns the averaged VAE, its latents normalised."""
    vae = build_vae().to(device)
    ema = copy.deepcopy(vae).requires_grad_(False)
    images, seen = drawings.images, drawings.indices(held_out=False)

    def loss_fn(step: int, generator: torch.Generator) -> Tensor:
        whole = step % 4 == 0
        count = config.batch_size // 4 if whole else config.batch_size
        chosen = seen[torch.randint(len(seen), (count,), generator=generator)]
        pixels = augment(to_unit(images[chosen]), generator)
        pixels = (pixels if whole else random_crop(pixels, generator)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        return reconstruction_loss(decoded.float(), pixels) + KL_WEIGHT * posterior.kl().float().mean()

    train(vae, loss_fn, config, folder, ema)
    return normalise_latents(ema, images[seen], device)


def to_unit(images: Tensor) -> Tensor:
    """uint8 pictures -> float in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the batch, and shift all of it by up to 4 pixels; on white ground the rim may wrap around."""
    mirrored = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
    pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    down, right = torch.randint(-4, 5, (2,), generator=generator).tolist()
    return pixels.roll((down, right), dims=(-2, -1))


def random_crop(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter of the area. The VAE is convolutional, so it learns as much from crops at a quarter of the cost."""
    size = pixels.shape[-1] // 2
    top, left = torch.randint(0, size + 1, (2,), generator=generator).tolist()
    return pixels[:, :, top : top + size, left : left + size]


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Squared error for the colours, L1 for sharpness, and L1 of neighbouring pixels' differences for the edges."""
    loss = F.l1_loss(decoded, pixels) + SQUARED_WEIGHT * F.mse_loss(decoded, pixels)
    for axis in (-2, -1):
        loss = loss + EDGE_WEIGHT * F.l1_loss(decoded.diff(dim=axis), pixels.diff(dim=axis))
    return loss


@torch.no_grad()
def normalise_latents(vae: Network, images: Tensor, device: torch.device) -> Network:
    """Fold each latent channel's mean and spread into the VAE: `latents * SCALING_FACTOR` gets mean 0 and spread 1.

    The last layer of the encoder and the first of the decoder are linear, so the pictures stay the same.
    """
    latents = torch.cat([encode_mean(vae, batch, device) for batch in images.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * SCALING_FACTOR
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    quant.bias[:channels] -= mean
    quant.bias[:channels] /= std
    quant.weight[:channels] /= std[:, None, None, None]
    # The second half of the encoder's output is the log-variance; it shrinks with the square of the scale.
    quant.bias[channels:] -= 2 * std.log()
    post.bias += torch.einsum("oi,i->o", post.weight[:, :, 0, 0], mean)
    post.weight *= std[None, :, None, None]
    return vae


@torch.no_grad()
def encode_mean(vae: Network, images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) -> unscaled latents (B, 4, H/8, W/8), the posterior's mean, float32."""
    return vae.encode(to_unit(images).to(device)).latent_dist.mean.float()
