"""What samplers start from and add: noise from each picture's own seed, whatever batch it is in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lcm_core.diffusion.process import Process, stable_diffusion
from lcm_core.errors import InputError

NoiseSampler = Callable[[Tensor, Tensor], Tensor]
"""`noise_sampler(sigma, sigma_next)` gives noise for the step between the two levels."""


def initial_latents(
    noise: Tensor, sigma: Tensor | float, x0: Tensor | None = None, process: Process | None = None
) -> Tensor:
    """The x that a sampler starts from at noise level `sigma` (= sigmas[0]), like noise.

    From nothing: noise * sqrt(1 + sigma^2), the unit-variance start of variance-preserving samplers such as diffusers';
    sigma * noise on a flow. From an image's latents: a x0 + b noise, at the sampler's scale.
    """
    process, level = process or stable_diffusion(), torch.as_tensor(sigma, dtype=torch.float64)
    if x0 is None:
        return noise * float(process.initial_scale(level))
    a, b = process.scales(level)
    return float(a) * x0 + float(b) * noise


def initial_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise, (len(seeds), *shape): each image's own, from its own seed, whatever batch it is in.

    Drawn on the CPU in float32, so that it is the same for every device and dtype; equal to diffusers' with
    `torch.Generator().manual_seed(seed)`.

    Raises:
        InputError: a seed that does not fit 64 bits.
    """
    return _draw([_generator(seed) for seed in seeds], shape, torch.device(device), dtype)


def seeded_noise_sampler(
    seeds: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> NoiseSampler:
    """A `noise_sampler` that continues each seed's stream behind `initial_noise`, (len(seeds), *shape) per call.

    Draw 0 of every stream is `initial_noise` and is skipped here: to re-noise with the noise that the image began with
    would not be fresh noise. Make a new one for every picture: it remembers how far it is.

    Raises:
        InputError: a seed that does not fit 64 bits.
    """
    generators = [_generator(seed) for seed in seeds]
    target = torch.device(device)
    _draw(generators, shape, target, dtype)

    def noise_sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return _draw(generators, shape, target, dtype)

    return noise_sampler


def _generator(seed: int) -> torch.Generator:
    if not -(2**63) <= seed < 2**64:
        raise InputError(f"seed {seed} does not fit 64 bits; use 0 to {2**64 - 1}")
    return torch.Generator().manual_seed(seed)


def _draw(
    generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    noise = torch.empty(len(generators), *shape)
    for sample, generator in zip(noise, generators, strict=True):
        sample.normal_(generator=generator)
    # A blocking copy to the GPU would wait for all work queued there.
    return noise.to(device, dtype, non_blocking=device.type == "cuda")
