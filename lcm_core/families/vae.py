"""VAEs of video models, which normalise each channel of their latents, and of Flux.2, whose latents are patches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.families.loading import load_network
from lcm_core.networks.device import choose_dtype
from lcm_core.networks.vae import VAE


class VideoVAE(VAE):
    """An AutoencoderKLWan or AutoencoderKLQwenImage.

    Latents (B, C, frames, h, w), of still pictures (B, C, h, w), are (raw - mean) / std of each channel.
    """

    def __init__(self, model: Any, scale: int, still: bool) -> None:
        super().__init__(model, 1.0, scale, model.config.z_dim)
        self._still = still
        self._mean, self._std = (torch.tensor(model.config[name]) for name in ("latents_mean", "latents_std"))

    def _to_latents(self, raw: Tensor) -> Tensor:
        return (raw - _channels(self._mean, raw)) / _channels(self._std, raw)

    def _to_raw(self, latents: Tensor) -> Tensor:
        return latents * _channels(self._std, latents) + _channels(self._mean, latents)

    def _moments(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) or video (B, 3, frames, H, W)."""
        moments = super()._moments(image.unsqueeze(2) if image.ndim == 4 else image)
        return moments.squeeze(2) if self._still else moments

    def _pixels(self, latents: Tensor) -> Tensor:
        """The pixels of one frame, (B, 3, H, W)."""
        pixels = super()._pixels(latents.unsqueeze(2) if self._still else latents)
        return pixels.squeeze(2) if pixels.shape[2] == 1 else pixels


class PatchedVAE(VAE):
    """An AutoencoderKLFlux2: latents are patches of 2 x 2 of another VAE's, normalised by a batch norm's statistics."""

    def __init__(self, model: Any) -> None:
        plain = VAE(model, 1.0)
        super().__init__(model, 1.0, 2 * plain.scale, 4 * plain.latent_channels)
        self._plain = plain
        self._mean = model.bn.running_mean.float()
        self._std = (model.bn.running_var.float() + model.config.batch_norm_eps).sqrt()

    def encode(self, image: Tensor, generator: torch.Generator | None = None, tile: int | None = None) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / scale, W / scale); see `VAE.encode`."""
        from einops import rearrange

        self.check_size(image)
        raw = rearrange(self._plain.encode(image, generator, tile), "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
        return (raw - _channels(self._mean, raw)) / _channels(self._std, raw)

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """(B, C, h, w) -> (B, 3, scale * h, scale * w); see `VAE.decode`."""
        from einops import rearrange

        raw = latents * _channels(self._std, latents) + _channels(self._mean, latents)
        return self._plain.decode(rearrange(raw, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2), tile)


def load_video_vae(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> VAE:
    """Wan's, with latents of video."""
    model = load_network("AutoencoderKLWan", folder, device, dtype or choose_dtype(device))
    return VideoVAE(model, model.config.scale_factor_spatial, still=False)


def load_still_vae(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> VAE:
    """Qwen-Image's, a video VAE for pictures alone."""
    model = load_network("AutoencoderKLQwenImage", folder, device, dtype or choose_dtype(device))
    return VideoVAE(model, 2 ** len(model.config.temperal_downsample), still=True)


def load_patched_vae(folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> VAE:
    """Load Flux.2's VAE, whose latents are patched."""
    return PatchedVAE(load_network("AutoencoderKLFlux2", folder, device, dtype or choose_dtype(device)))


def plain_latents(config: Mapping[str, Any]) -> tuple[int, int]:
    """(channels, pixels per latent pixel) of an AutoencoderKL."""
    return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)


def video_latents(config: Mapping[str, Any]) -> tuple[int, int]:
    """(channels, pixels per latent pixel) of Wan's VAE."""
    return config["z_dim"], config["scale_factor_spatial"]


def still_latents(config: Mapping[str, Any]) -> tuple[int, int]:
    """(channels, pixels per latent pixel) of Qwen-Image's VAE."""
    return config["z_dim"], 2 ** len(config["temperal_downsample"])


def patched_latents(config: Mapping[str, Any]) -> tuple[int, int]:
    """(channels, pixels per latent pixel) of Flux.2's VAE, with its latents patched."""
    channels, scale = plain_latents(config)
    return 4 * channels, 2 * scale


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...), to go with `like`."""
    return values.to(like).view(1, -1, *[1] * (like.ndim - 2))
