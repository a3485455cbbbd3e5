"""Samplers: free functions with k-diffusion's signature.

`model(x, sigma, **extra_args) -> denoised` is any k-diffusion denoiser, ours or a host's, with sigma (B,). What x is,
the process says: x0 + sigma eps by default, (1 - sigma) x0 + sigma eps for a rectified flow. Every sampler is a list of
linear steps (`Step`), worked out in Python numbers before the loop; inside it nothing is read back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_core.diffusion.guidance import Model
from lcm_core.diffusion.noise import NoiseSampler, initial_latents, initial_noise, seeded_noise_sampler
from lcm_core.diffusion.process import Process, stable_diffusion
from lcm_core.errors import InputError

__all__ = [
    "Callback",
    "NoiseSampler",
    "Step",
    "initial_latents",
    "initial_noise",
    "inpaint",
    "sample_dpm_2m",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_lcm",
    "sample_tcd",
    "seeded_noise_sampler",
]

Callback = Callable[[dict[str, Any]], object]
"""k-diffusion's: called in each step with a dict of `i`, `x`, `sigma`, `sigma_hat` and `denoised`."""


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
    process: Process | None = None,
) -> Tensor:
    """Multistep consistency sampling (arXiv 2310.04378 Alg. 3): jump to x0, add fresh noise of the next level, repeat.

    Args:
        model: a `ConsistencyDenoiser`, guided or not (or a host's denoiser).
        x: (B, ...) at noise level sigmas[0]; see `initial_latents`.
        sigmas: (N + 1,), falling; a last 0 ends without noise.
        callback: called in every step with {"i", "x", "sigma", "sigma_hat", "denoised"}.
        disable: True hides the progress bar (shown only where tqdm is installed); None shows it on a terminal only.
        noise_sampler: `noise_sampler(sigma, sigma_next)` gives noise like x; default `torch.randn_like`.
        process: the model's; None is Stable Diffusion's.

    Raises:
        InputError: sigmas that do not fall.
    """
    steps = [Step(0.0, a, b) for a, b in _scales(sigmas, process)[1:]]
    return _run(steps, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_tcd(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    process: Process | None = None,
    gamma: float = 0.3,
) -> Tensor:
    """Strategic stochastic sampling of trajectory consistency distillation (arXiv 2402.19159 Alg. 4); see `sample_lcm`.

    Jumps along the trajectory to s = floor((1 - gamma) t_next), then adds the noise that leads from s up to t_next. The
    last step lands on timestep 0, as diffusers' TCDScheduler: sqrt(abar_0) x0 + sqrt(1 - abar_0) eps. On a flow s is
    (1 - gamma) t_next, and the last step lands on the picture.

    Args:
        model: a plain `Denoiser`: it is the jump, not boundary scalings, that makes TCD consistent.
        gamma: share of fresh randomness, "eta" in diffusers; 0 is deterministic, 1 re-noises wholly from timestep 0.

    Raises:
        InputError: gamma outside [0, 1], or sigmas that do not fall.
    """
    if not 0 <= gamma <= 1:
        raise InputError(f"gamma={gamma} is outside [0, 1]; use 0 for deterministic, 0.3 as a start")
    steps = _tcd_steps(sigmas, gamma, process or stable_diffusion())
    return _run(steps, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    process: Process | None = None,
) -> Tensor:
    """Euler's method (arXiv 2206.00364 Alg. 1 without the second half); see `sample_lcm`. Draws no noise.

    In these coordinates it is deterministic DDIM (arXiv 2010.02502 Eq. 12 with sigma 0), which needs no own function.
    """
    steps = [_jump(before, after) for before, after in pairwise(_scales(sigmas, process))]
    return _run(steps, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    process: Process | None = None,
) -> Tensor:
    """DPM-Solver++ 2M (arXiv 2211.01095 Alg. 2): second order with one call per step; see `sample_lcm`. Draws no noise.

    The first step, and a last one to sigma 0, are of first order.
    """
    scales = _scales(sigmas, process)
    steps = []
    for (before, after), bend in zip(pairwise(scales), _bends(scales), strict=True):
        x_scale, denoised_scale, *_ = _jump(before, after)
        steps.append(Step(x_scale, denoised_scale * (1 + bend), last_denoised_scale=-denoised_scale * bend))
    return _run(steps, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_dpm_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    process: Process | None = None,
) -> Tensor:
    """DPM-Solver-2 (arXiv 2206.00927) as a multistep method with one call per step; see `sample_lcm`. Draws no noise.

    What `sample_dpmpp_2m` does with denoised, done with eps = (x - denoised) / sigma. Here to be compared with: papers
    measure against it.
    """
    scales = _scales(sigmas, process)
    steps = []
    for i, bend in enumerate(_bends(scales)):
        (a, b), (a_next, b_next) = scales[i : i + 2]
        # eps = (x - a x0) / b, and DDIM's jump plus `growth` times what eps has changed by
        x_scale, denoised_scale, *_ = _jump((a, b), (a_next, b_next))
        growth, last_x, last_denoised = 0.0, 0.0, 0.0
        if bend:
            growth = (b_next - a_next * b / a) * bend
            last_x, last_denoised = -growth / scales[i - 1][1], growth * scales[i - 1][0] / scales[i - 1][1]
        steps.append(Step(x_scale + growth / b, denoised_scale - growth * a / b, 0.0, last_denoised, last_x))
    return _run(steps, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def inpaint(model: Model, x0_latents: Tensor, mask: Tensor, noise: Tensor, process: Process | None = None) -> Model:
    """Wrap a model so that any sampler repaints where `mask` is 1 and keeps `x0_latents` where it is 0.

    In each call the kept region of x becomes x0_latents at noise level sigma, and that of the result x0_latents itself.
    `sample_tcd` ends on timestep 0 and leaves a trace of noise there: paste the kept region once more.

    Args:
        x0_latents, noise: (B, C, H, W); mask: (B or 1, 1, H, W) in [0, 1], fractions blend.
    """
    keep, scales = 1 - mask, (process or stable_diffusion()).scales

    def inpainted(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        a, b = scales(sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)))
        known = a * x0_latents + b * noise
        return model(x * mask + known * keep, sigma, **extra_args) * mask + x0_latents * keep

    return inpainted


def _levels(sigmas: Tensor) -> list[float]:
    levels: list[float] = sigmas.tolist()
    if not all(after < before for before, after in pairwise(levels)):
        first = next(i for i in range(len(levels)) if not levels[i + 1] < levels[i])
        raise InputError(f"sigmas must fall strictly, but {levels[first]:g} is followed by {levels[first + 1]:g}")
    return levels


def _scales(sigmas: Tensor, process: Process | None) -> list[tuple[float, float]]:
    """(a, b) of x at each of the N + 1 noise levels."""
    _levels(sigmas)
    a, b = (process or stable_diffusion()).scales(sigmas.cpu().double())
    return list(zip(a.tolist(), b.tolist(), strict=True))


def _jump(before: tuple[float, float], after: tuple[float, float]) -> Step:
    """x' = a' x0 + b' eps with eps = (x - a x0) / b."""
    ratio = after[1] / before[1]
    return Step(ratio, after[0] - before[0] * ratio)


def _bends(scales: Sequence[tuple[float, float]]) -> list[float]:
    """How much of the last change each step carries on: h / (2 h_last) with h the fall of log(b / a), or 0."""
    ratios = [b / a if a else math.inf for a, b in scales]
    lengths = [math.log(ratio / after) if after > 0 else 0.0 for ratio, after in pairwise(ratios)]
    return [length / lengths[i - 1] / 2 if i > 0 else 0.0 for i, length in enumerate(lengths)]


def _tcd_steps(sigmas: Tensor, gamma: float, process: Process) -> list[Step]:
    levels = sigmas.cpu().double()
    landings = process.landing(sigmas.cpu()[1:], gamma)
    visited, landed = _scales(sigmas, process), zip(*(part.tolist() for part in process.scales(landings)), strict=True)
    steps = []
    for i, landing in enumerate(landed):
        step, after = _jump(visited[i], landing), visited[i + 1]
        if levels[i + 1] == 0:
            end = float(process.end_scale(landings[i]))
            steps.append(Step(end * step.x_scale, end * step.denoised_scale))
            continue
        # from a x0 + b eps up to a' x0 + b' eps: scaled by a' / a, then the noise that is missing
        climb = after[0] / landing[0]
        missing = after[1] ** 2 - (climb * landing[1]) ** 2
        noise = math.sqrt(missing) if missing > 0 else 0.0
        steps.append(Step(climb * step.x_scale, climb * step.denoised_scale, noise))
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
    per_sample, scalars = levels[:, None].repeat(1, x.shape[0]).unbind(), levels.unbind()  # N + 1 of (B,) and of ()
    last: tuple[Tensor, Tensor] | None = None  # x and denoised
    for i in _progress(len(steps), disable):
        denoised = model(x, per_sample[i], **extra_args)
        if callback is not None:
            callback({"i": i, "x": x, "sigma": scalars[i], "sigma_hat": scalars[i], "denoised": denoised})
        step = steps[i]
        noise = None
        if step.noise_scale:
            noise = noise_sampler(scalars[i], scalars[i + 1]) if noise_sampler else torch.randn_like(x)
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
