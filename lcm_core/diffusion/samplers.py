"""Samplers: free functions with k-diffusion's signature.

`model(x, sigma, **extra_args) -> denoised` is any k-diffusion denoiser, ours or a host's, with x = x0 + sigma * eps and
sigma (B,). Every sampler is a list of linear steps (`Step`), worked out in Python numbers before the loop; inside it
nothing is read back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_core.diffusion.guidance import Model
from lcm_core.diffusion.schedule import NoiseSchedule, get_alphas_cumprod
from lcm_core.errors import InputError

NoiseSampler = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict[str, Any]], object]


class Step(NamedTuple):
    """One update: x <- x_scale x + denoised_scale denoised + noise_scale noise, and the last step's x and denoised."""

    x_scale: float
    denoised_scale: float
    noise_scale: float = 0.0
    last_denoised_scale: float = 0.0
    last_x_scale: float = 0.0


def sample_lcm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Multistep consistency sampling (arXiv 2310.04378 Alg. 3): jump to x0, add fresh noise of the next level, repeat.

    Args:
        model: a `ConsistencyDenoiser`, guided or not (or a host's denoiser).
        x: (B, ...) at noise level sigmas[0]; see `initial_latents`.
        sigmas: (N + 1,), falling; a last 0 ends without noise.
        callback: called in every step with {"i", "x", "sigma", "sigma_hat", "denoised"}.
        disable: True hides the progress bar (shown only where tqdm is installed); None shows it on a terminal only.
        noise_sampler: `noise_sampler(sigma, sigma_next)` gives noise like x; default `torch.randn_like`.

    Raises:
        InputError: sigmas that do not fall.
    """
    steps = [Step(0.0, 1.0, sigma_next) for sigma_next in _levels(sigmas)[1:]]
    return _run(steps, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_tcd(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    gamma: float = 0.3,
    schedule: NoiseSchedule | None = None,
) -> Tensor:
    """Strategic stochastic sampling of trajectory consistency distillation (arXiv 2402.19159 Alg. 4); see `sample_lcm`.

    Jumps along the trajectory to s = floor((1 - gamma) t_next), then adds the noise that leads from s up to t_next. The
    last step lands on timestep 0, as diffusers' TCDScheduler: sqrt(abar_0) x0 + sqrt(1 - abar_0) eps.

    Args:
        model: a plain `Denoiser`: it is the jump, not boundary scalings, that makes TCD consistent.
        gamma: share of fresh randomness, "eta" in diffusers; 0 is deterministic, 1 re-noises wholly from timestep 0.
        schedule: the model's noise levels; None means Stable Diffusion's.

    Raises:
        InputError: gamma outside [0, 1], or sigmas that do not fall.
    """
    if not 0 <= gamma <= 1:
        raise InputError(f"gamma={gamma} is outside [0, 1]; use 0 for deterministic, 0.3 as a start")
    steps = _tcd_steps(sigmas, gamma, schedule or NoiseSchedule(get_alphas_cumprod()))
    return _run(steps, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Euler's method (arXiv 2206.00364 Alg. 1 without the second half); see `sample_lcm`. Draws no noise.

    In these coordinates it is deterministic DDIM (arXiv 2010.02502 Eq. 12 with sigma 0), which needs no own function.
    """
    steps = [Step(after / before, 1 - after / before) for before, after in pairwise(_levels(sigmas))]
    return _run(steps, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++ 2M (arXiv 2211.01095 Alg. 2): second order with one call per step; see `sample_lcm`. Draws no noise.

    The first step, and a last one to sigma 0, are of first order.
    """
    levels = _levels(sigmas)
    steps = []
    for (sigma, sigma_next), bend in zip(pairwise(levels), _bends(levels), strict=True):
        ratio = sigma_next / sigma
        steps.append(Step(ratio, (1 - ratio) * (1 + bend), last_denoised_scale=(ratio - 1) * bend))
    return _run(steps, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_dpm_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver-2 (arXiv 2206.00927) as a multistep method with one call per step; see `sample_lcm`. Draws no noise.

    What `sample_dpmpp_2m` does with denoised, done with eps = (x - denoised) / sigma. Here to be compared with: papers
    measure against it.
    """
    levels = _levels(sigmas)
    steps = []
    for i, bend in enumerate(_bends(levels)):
        now = (levels[i + 1] / levels[i] - 1) * (1 + bend)
        last = (levels[i] - levels[i + 1]) / levels[i - 1] * bend if bend else 0.0
        steps.append(Step(1 + now, -now, last_denoised_scale=-last, last_x_scale=last))
    return _run(steps, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def initial_latents(noise: Tensor, sigma: Tensor | float, x0: Tensor | None = None) -> Tensor:
    """The x that a sampler starts from at noise level `sigma` (= sigmas[0]), like noise.

    From nothing: noise * sqrt(1 + sigma^2), the unit-variance start of variance-preserving samplers such as diffusers'.
    From an image's latents: x0 + sigma * noise.
    """
    if x0 is not None:
        return x0 + sigma * noise
    return noise * (1 + sigma * sigma) ** 0.5


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


def inpaint(model: Model, x0_latents: Tensor, mask: Tensor, noise: Tensor) -> Model:
    """Wrap a model so that any sampler repaints where `mask` is 1 and keeps `x0_latents` where it is 0.

    In each call the kept region of x becomes x0_latents + sigma * noise, and that of the result x0_latents itself.
    `sample_tcd` ends on timestep 0 and leaves a trace of noise there: paste the kept region once more.

    Args:
        x0_latents, noise: (B, C, H, W); mask: (B or 1, 1, H, W) in [0, 1], fractions blend.
    """
    keep = 1 - mask

    def inpainted(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        known = x0_latents + sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) * noise
        return model(x * mask + known * keep, sigma, **extra_args) * mask + x0_latents * keep

    return inpainted


def _levels(sigmas: Tensor) -> list[float]:
    levels: list[float] = sigmas.tolist()
    if not all(after < before for before, after in pairwise(levels)):
        first = next(i for i in range(len(levels)) if not levels[i + 1] < levels[i])
        raise InputError(f"sigmas must fall strictly, but {levels[first]:g} is followed by {levels[first + 1]:g}")
    return levels


def _bends(levels: Sequence[float]) -> list[float]:
    """How much of the last change each step carries on: h / (2 h_last) with h = log(sigma / sigma_next), or 0."""
    lengths = [math.log(sigma / sigma_next) if sigma_next > 0 else 0.0 for sigma, sigma_next in pairwise(levels)]
    return [length / lengths[i - 1] / 2 if i > 0 else 0.0 for i, length in enumerate(lengths)]


def _tcd_steps(sigmas: Tensor, gamma: float, schedule: NoiseSchedule) -> list[Step]:
    levels = _levels(sigmas)
    timesteps = schedule.sigma_to_t(sigmas.cpu().float())
    # In float32 because diffusers is: 0.7 * 700 is 490 there, and 489.99999999999994 in float64.
    jumps = ((1 - gamma) * timesteps).floor().long()
    steps = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        landing = sigma_next  # sigma at s
        if sigma_next == 0 or (gamma > 0 and jumps[i + 1] < timesteps[i + 1]):
            landing = float(schedule.sigmas[jumps[i + 1]])
        ratio = landing / sigma
        # sigma 0 stands for diffusers' timestep 0, whose result is taken as variance-preserving
        scale = 1.0 if sigma_next > 0 else (1 + landing**2) ** -0.5
        noise = math.sqrt(sigma_next**2 - landing**2) if sigma_next > landing else 0.0
        steps.append(Step(scale * ratio, scale * (1 - ratio), noise))
    return steps


def _run(
    steps: Sequence[Step],
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None,
) -> Tensor:
    extra_args = extra_args or {}
    # Half precision would blur the timestep, and float64 is not to be had on every device.
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    levels = sigmas.to(x.device, precision)
    per_sample = levels[:, None].repeat(1, x.shape[0]).unbind()  # N + 1 of (B,)
    last: tuple[Tensor, Tensor] | None = None  # x and denoised
    for i in _progress(len(steps), disable):
        denoised = model(x, per_sample[i], **extra_args)
        if callback is not None:
            callback({"i": i, "x": x, "sigma": levels[i], "sigma_hat": levels[i], "denoised": denoised})
        step = steps[i]
        noise = None
        if step.noise_scale:
            noise = noise_sampler(levels[i], levels[i + 1]) if noise_sampler else torch.randn_like(x)
        x, last = _combine(step, x, denoised, noise, last), (x, denoised)
    return x


def _combine(
    step: Step, x: Tensor, denoised: Tensor, noise: Tensor | None, last: tuple[Tensor, Tensor] | None
) -> Tensor:
    # Terms of weight 0 are left out, not multiplied: it is quicker, and 0 * inf would be NaN.
    total = denoised if step.denoised_scale == 1 else denoised * step.denoised_scale
    if step.x_scale:
        total = torch.add(total, x, alpha=step.x_scale)
    if noise is not None:
        total = torch.add(total, noise, alpha=step.noise_scale)
    for before, scale in zip(last or (), (step.last_x_scale, step.last_denoised_scale), strict=False):
        if scale:
            total = torch.add(total, before, alpha=scale)
    return total


def _progress(count: int, disable: bool | None) -> Iterable[int]:
    if disable:
        return range(count)
    try:
        from tqdm.auto import trange
    except ImportError:
        return range(count)
    return trange(count, disable=disable)


def _generator(seed: int) -> torch.Generator:
    if not -(2**63) <= seed < 2**64:
        raise InputError(f"seed {seed} does not fit 64 bits; use 0 to {2**64 - 1}")
    return torch.Generator().manual_seed(seed)


def _draw(
    generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    noise = torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
    # A blocking copy to the GPU would wait for all work queued there.
    return noise.to(device, dtype, non_blocking=device.type == "cuda")
