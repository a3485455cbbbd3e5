"""The recipe's VAE: an AutoencoderKL in Stable Diffusion's layout, small."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lcm_core.networks.unet import set_attention
from trainer.cuda_graphs import graphed
from trainer.data.prefetch import Prefetch
from trainer.loop import LoopConfig, step_generator, train
from trainer.recipes.emoji import AnyModule
from trainer.recipes.emoji.compute import autocast, place
from trainer.recipes.emoji.data import Drawings
from trainer.recipes.emoji.scenes import paste, random_ground

SCALING_FACTOR = 0.18215
"""Stable Diffusion 1.x's. Hosts hard-code it, so the latents are brought to it instead of the other way round."""
WIDTHS = (32, 32, 96, 192)
"""Channels, from full resolution to an eighth of it. Narrow where pictures are large and cost the most time, and wide
where the latents are turned into shapes. Hosts normalise 32 groups of channels, so no width may be below."""
KL_WEIGHT = 1e-6
SQUARED_WEIGHT = 5.0
EDGE_WEIGHT = 0.25
EARLY_PIECES = {4: 0.9, 2: 0.08, 1: 0.02}
"""Divisors of the pictures' width, and the shares of the steps that see pieces so wide. The VAE is convolutional, so
small pieces teach it as much for a fraction of the cost; large ones, how attention works over a whole picture."""
LATE_PIECES = {4: 0.2, 2: 0.7, 1: 0.1}
"""The same for the last `LATE_SHARE` of the steps."""
LATE_SHARE = 0.35
WATCH_EVERY = 250
"""Steps between two looks at held-out drawings."""


def build_vae() -> AnyModule:
    """An untrained AutoencoderKL: 8 pixels a latent, 4 channels, 6 million weights."""
    from diffusers import AutoencoderKL

    blocks = 4
    vae: AnyModule = AutoencoderKL(
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=SCALING_FACTOR,
    )
    set_attention(vae, "bmm")
    return vae


def train_vae(
    drawings: Drawings, config: LoopConfig, folder: Path, device: torch.device, workers: int = 0
) -> AnyModule:
    """Train on the drawings that are not held out. Returns the averaged VAE, its latents normalised.

    `folder/psnr.jsonl` says how well held-out drawings are reconstructed on the way.
    """
    vae = place(build_vae(), device)
    ema = copy.deepcopy(vae).requires_grad_(False)
    seen, size = drawings.indices(held_out=False), drawings.images.shape[-1]

    def draw(step: int) -> tuple[Tensor, Tensor]:
        generator = step_generator(config.seed, step)
        shares = LATE_PIECES if step >= config.steps * (1 - LATE_SHARE) else EARLY_PIECES
        kind = int(torch.multinomial(torch.tensor(list(shares.values())), 1, generator=generator))
        width = size // list(shares)[kind]
        pixels = to_unit(random_pieces(drawings, seen, config, width, generator))
        return pixels, torch.randn(len(pixels), 4, width // 8, width // 8, generator=generator)

    def vae_loss(pixels: Tensor, noise: Tensor) -> Tensor:
        with autocast(device):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        return reconstruction_loss(decoded.float(), pixels) + KL_WEIGHT * posterior.kl().float().mean()

    def watch(step: int, loss: float) -> None:
        if (step + 1) % WATCH_EVERY == 0:
            line = {"step": step + 1, "psnr": round(psnr(ema, drawings.on_white(held_out_sample(drawings)), device), 2)}
            with (folder / "psnr.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")

    batches, loss = Prefetch(draw, config.steps, workers), graphed(vae_loss, vae.parameters(), device)
    train(vae, lambda step, _: loss(*batches(step)), config, folder, ema, watch)
    return normalise_latents(ema, drawings.on_white(seen), device)


def build_tiny_vae() -> AnyModule:
    """An untrained AutoencoderTiny for the same latents: a fifteenth of the weights, without normalisation."""
    from diffusers import AutoencoderTiny

    widths = (32,) * len(WIDTHS)
    tiny: AnyModule = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 2, 2),
        num_decoder_blocks=(2, 2, 1, 1),
    )
    return tiny


def train_tiny_vae(
    vae: AnyModule, drawings: Drawings, config: LoopConfig, folder: Path, device: torch.device, workers: int = 0
) -> AnyModule:
    """Train a tiny VAE that encodes and decodes the same scaled latents as the full one. Returns its average."""
    tiny = place(build_tiny_vae(), device)
    ema = copy.deepcopy(tiny).requires_grad_(False)
    seen, size = drawings.indices(held_out=False), drawings.images.shape[-1]

    def draw(step: int) -> Tensor:
        return to_unit(random_pieces(drawings, seen, config, size // 2, step_generator(config.seed, step)))

    def tiny_loss(pixels: Tensor) -> Tensor:
        with torch.no_grad(), autocast(device):
            latents = vae.encode(pixels).latent_dist.mean.float() * SCALING_FACTOR
        with autocast(device):
            encoded, decoded = tiny.encode(pixels).latents, tiny.decode(latents).sample
        return reconstruction_loss(decoded.float(), pixels) + F.l1_loss(encoded.float(), latents)

    batches, loss = Prefetch(draw, config.steps, workers), graphed(tiny_loss, tiny.parameters(), device)
    train(tiny, lambda step, _: loss(batches(step)), config, folder, ema)
    return ema


def held_out_sample(drawings: Drawings, count: int = 32) -> Tensor:
    """The numbers of some held-out drawings of the core styles, always the same."""
    held_out = torch.tensor([i for i, e in enumerate(drawings.entries) if e.held_out and e.is_core])
    return held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:count]]


@torch.no_grad()
def psnr(vae: AnyModule, images: Tensor, device: torch.device) -> float:
    """Mean peak signal-to-noise ratio in dB of uint8 pictures (N, 3, S, S) after the VAE; the signal spans [-1, 1]."""
    ratios = []
    for batch in images.split(8):
        pixels = to_unit(batch).to(device)
        with autocast(device):
            decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.float().clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / (decoded - pixels).square().mean((1, 2, 3))))
    return float(torch.cat(ratios).mean())


def to_unit(images: Tensor) -> Tensor:
    """uint8 pictures -> float in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def random_pieces(
    drawings: Drawings, allowed: Tensor, config: LoopConfig, width: int, generator: torch.Generator
) -> Tensor:
    """A batch (B, 3, width, width) of random views, float in [0, 255]; of whole pictures a quarter as many."""
    count = config.batch_size if width < drawings.images.shape[-1] else max(1, config.batch_size // 4)
    chosen = allowed[torch.randint(len(allowed), (count,), generator=generator)]
    return torch.stack([random_view(drawings.images[i], width, generator) for i in chosen])


def random_view(drawing: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A drawing (4, S, S) somewhere in a picture (3, size, size), float in [0, 255]: of any scale between half a
    picture and the full resolution, mirrored or not, on a coloured ground or, mostly, on white.
    """
    full = drawing.shape[-1]
    scale, mirror, white = torch.rand(3, generator=generator).tolist()
    # The benchmark's pictures are at full resolution, and smaller ones have more to tell in each pixel.
    scaled = full if scale < 0.5 else int(full * (0.5 + 0.5 * torch.rand((), generator=generator)))
    ground = random_ground(size, generator) if white > 0.6 else torch.full((3, size, size), 255.0)
    spare = min(scaled - size, 0), max(scaled - size, 0)
    margin = full // 16
    top, left = (-int(torch.randint(spare[0] - margin, spare[1] + margin + 1, (), generator=generator)) for _ in "yx")
    paste(ground, drawing.flip(-1) if mirror < 0.5 else drawing, top, left, scaled)
    return ground


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Squared error for the colours, L1 for sharpness, and L1 of neighbouring pixels' differences for the edges."""
    loss = F.l1_loss(decoded, pixels) + SQUARED_WEIGHT * F.mse_loss(decoded, pixels)
    for axis in (-2, -1):
        loss = loss + EDGE_WEIGHT * F.l1_loss(decoded.diff(dim=axis), pixels.diff(dim=axis))
    return loss


@torch.no_grad()
def normalise_latents(vae: AnyModule, images: Tensor, device: torch.device) -> AnyModule:
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
def encode_mean(vae: AnyModule, images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) -> unscaled latents (B, 4, H/8, W/8), the posterior's mean, float32."""
    return vae.encode(to_unit(images).to(device)).latent_dist.mean.float()
