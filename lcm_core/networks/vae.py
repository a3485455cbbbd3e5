"""Pixels in [-1, 1] to scaled latents and back, with the full or the tiny VAE, in tiles when the picture is large."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.architecture import vae_config
from lcm_core.files.checkpoint import Checkpoint, Component, ModelPath, read_component, read_safetensors
from lcm_core.networks.device import LARGE_ON_CPU, Device, assemble, choose_device, choose_dtype, choose_memory_format

LARGEST_UNTILED = 128 * 128  # latent pixels: 1024 x 1024 with the usual factor of 8
TILE = 64
OVERLAP = 16
_NUMBERED = re.compile(r"([0-9]{1,3})\.(.+)")
"""Names in the tiny VAE's own files: the number of a layer, and the name inside."""


class VAE:
    """An AutoencoderKL or AutoencoderTiny that speaks [-1, 1] on one side and the diffusion's latents on the other.

    Attributes:
        model: the diffusers network.
        scale: pixels per latent pixel, along one side.
        latent_channels: channels of the latents.
    """

    def __init__(
        self,
        model: Any,
        scaling_factor: float | None = None,
        scale: int | None = None,
        latent_channels: int | None = None,
    ) -> None:
        parameter, config = next(model.parameters()), model.config
        channels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or ()
        self.model = model
        self.device, self.dtype = parameter.device, parameter.dtype
        self.scale: int = scale or 2 ** (len(channels) - 1)
        self.latent_channels: int = latent_channels or config.latent_channels
        self.scaling_factor: float = scaling_factor or config.scaling_factor
        self.shift_factor: float = config.get("shift_factor") or 0.0

    @torch.no_grad()
    def encode(self, image: Tensor, generator: torch.Generator | None = None, tile: int | None = None) -> Tensor:
        """Latents of a picture.

        Args:
            image: (B, 3, H, W) in [-1, 1]; both sides multiples of `scale`.
            generator: draws the latents from the encoder's distribution; None takes its mean. The tiny VAE has no
                distribution.
            tile: side of the tiles in latent pixels; None chooses, 0 never tiles.

        Returns:
            (B, latent_channels, H / scale, W / scale) float32, scaled and shifted for the U-Net, on the image's device.

        Raises:
            InputError: a side that is no multiple of `scale`.
        """
        height, width = self.check_size(image)
        size = (height // self.scale, width // self.scale)
        moments = _tiled(self._moments, image, size, self.scale, 1, _tile_side(size, tile))
        latents = moments
        if moments.shape[1] == 2 * self.latent_channels:
            latents, log_variance = moments.chunk(2, dim=1)
            if generator is not None:
                noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents.device)
                latents = latents + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        return self._to_latents(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """The picture of latents.

        Args:
            latents: (B, latent_channels, h, w), as `encode` gives them.
            tile: side of the tiles in latent pixels; None chooses, 0 never tiles. Memory then depends on the tile, not
                on the picture.

        Returns:
            (B, 3, scale * h, scale * w) float32 in [-1, 1], on the latents' device.
        """
        size = (latents.shape[-2], latents.shape[-1])
        return _tiled(self._pixels, self._to_raw(latents), size, 1, self.scale, _tile_side(size, tile)).clamp(-1, 1)

    def check_size(self, image: Tensor) -> tuple[int, int]:
        """(height, width) of a picture.

        Raises:
            InputError: a side that is no multiple of `scale`.
        """
        height, width = image.shape[-2:]
        if height % self.scale or width % self.scale:
            near = "x".join(str(max(round(side / self.scale), 1) * self.scale) for side in (width, height))
            raise InputError(f"size {width}x{height} does not fit this VAE; use multiples of {self.scale}, e.g. {near}")
        return height, width

    def _to_latents(self, raw: Tensor) -> Tensor:
        return (raw - self.shift_factor) * self.scaling_factor

    def _to_raw(self, latents: Tensor) -> Tensor:
        return latents / self.scaling_factor + self.shift_factor

    def _moments(self, image: Tensor) -> Tensor:
        encoded = self.model.encode(image.to(self.device, self.dtype))
        return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents.to(self.device, self.dtype), return_dict=False)[0]


def load_vae(
    source: ModelPath | Component,
    device: Device | None = None,
    dtype: str | torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    scaling_factor: float | None = None,
) -> VAE:
    """Load a VAE, frozen and in evaluation mode.

    Args:
        source: what `checkpoint.read_component` reads, or what it returns; or `taesd_decoder.safetensors` with
            `taesd_encoder.safetensors` beside it.
        device, memory_format: None chooses for this machine.
        dtype: None chooses, but never float16, in which SDXL's VAE overflows, and float32 for a small AutoencoderKL on
            a CPU, which gains little there and whose pictures bfloat16 moves by some 255ths.
        scaling_factor: overrides the VAE's own. A bare SDXL VAE file has the shapes of SD 1.x and needs 0.13025 here.

    Raises:
        InputError: no usable VAE there.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    component = source if isinstance(source, Component) else _read_vae(source)
    kinds: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    kind = component.config.get("_class_name", "AutoencoderKL")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{component.source} holds a {kind}; give an AutoencoderKL or an AutoencoderTiny")
    place = choose_device(device)
    weights = sum(tensor.numel() for tensor in component.tensors.values())
    number = choose_dtype(place, dtype, LARGE_ON_CPU if kind == "AutoencoderTiny" else weights)
    if dtype is None and number == torch.float16:
        number = torch.float32
    layout = choose_memory_format(place, memory_format)
    config = dict(component.config)
    if kind == "AutoencoderTiny":  # it saves what it does not take, and would warn of it
        config.pop("block_out_channels", None)
    model = assemble(lambda: kinds[kind].from_config(config), component, place, number, layout)
    return VAE(model, scaling_factor)


def _read_vae(source: ModelPath) -> Component:
    """The tiny VAE's own distribution is two bare sequences; its decoder counts a clamp that diffusers does not."""
    if not isinstance(source, Checkpoint) and Path(source).is_file():
        source = Checkpoint(source)
    if not isinstance(source, Checkpoint) or not (source.keys and all(map(_NUMBERED.fullmatch, source.keys))):
        return read_component(source, "vae")
    path = source.path
    state: dict[str, Tensor] = {}
    for half, first in (("encoder", 0), ("decoder", 1)):
        file = path.with_name(path.name.replace("decoder", half).replace("encoder", half))
        for key, value in read_safetensors(file)[0].items():
            numbered = _NUMBERED.fullmatch(key)
            if numbered is None:
                raise InputError(f"{file} is no {half} of a tiny VAE (it has '{key[:60]}'); give both of its files")
            state[f"{half}.layers.{int(numbered[1]) - first}.{numbered[2]}"] = value
    return Component(state, vae_config(state), str(path))


def _tile_side(size: tuple[int, int], tile: int | None) -> int:
    if tile is None:
        tile = TILE if size[0] * size[1] > LARGEST_UNTILED else 0
    if tile and tile <= OVERLAP:
        raise InputError(f"tile {tile} is too small; use more than {OVERLAP}, or 0 for no tiles")
    return tile


def _tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, size: tuple[int, int], grain_in: int, grain_out: int, tile: int
) -> Tensor:
    """Apply `function` tile by tile and blend the overlaps with linear ramps.

    Args:
        function: (B, C, a * grain_in, b * grain_in) -> (B, D, a * grain_out, b * grain_out).
        x: its whole input.
        size: (height, width) of the grid of latents.
        tile: side of a tile on that grid; 0 for one piece.
    """
    if not tile or max(size) <= tile:
        return function(x).to(x.device, torch.float32)
    total: Tensor | None = None
    weights = torch.zeros(size[0] * grain_out, size[1] * grain_out, device=x.device)
    shape = (min(tile, size[0]), min(tile, size[1]))
    ramps = [_ramp(side * grain_out, OVERLAP * grain_out).to(x.device) for side in shape]
    weight = ramps[0][:, None] * ramps[1]
    for top in _starts(size[0], tile):
        for left in _starts(size[1], tile):
            part = function(x[_window(top, left, shape, grain_in)]).to(x.device, torch.float32)
            total = part.new_zeros(*part.shape[:-2], *weights.shape) if total is None else total
            window = _window(top, left, shape, grain_out)
            total[window] += part * weight
            weights[window] += weight
    assert total is not None
    return total / weights


def _window(top: int, left: int, shape: tuple[int, int], grain: int) -> tuple[Any, slice, slice]:
    return ..., slice(top * grain, (top + shape[0]) * grain), slice(left * grain, (left + shape[1]) * grain)


def _starts(side: int, tile: int) -> list[int]:
    """Evenly spread tiles that overlap by at least `OVERLAP`."""
    if side <= tile:
        return [0]
    number = math.ceil((side - OVERLAP) / (tile - OVERLAP))
    return [round(i * (side - tile) / (number - 1)) for i in range(number)]


def _ramp(side: int, ramp: int) -> Tensor:
    """Weights along one side of a tile: rising over `ramp`, flat, falling."""
    distance = torch.arange(side) + 0.5
    return (torch.minimum(distance, side - distance) / ramp).clamp(max=1)
