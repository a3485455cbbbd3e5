"""The pieces of which the methods' losses are made: what is drawn, the guided teacher's jump, the weights.

Samples are variance-preserving, x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps; f, w and the jump are those of
arXiv 2310.04378.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_core.diffusion.consistency import add_noise, apply_boundary, to_eps, to_x0
from lcm_core.diffusion.guidance import guide
from lcm_core.diffusion.solver import solver_jump
from lcm_core.errors import InputError
from trainer.methods.config import (
    TIMESTEP_SAMPLINGS,
    WEIGHTINGS,
    ConsistencyConfig,
    MethodConfig,
    TeacherJumpConfig,
)
from trainer.methods.distances import adaptive_c, distance

Conditioning = dict[str, Any]
Network = Callable[[Tensor, Tensor, Conditioning, Tensor | None], Tensor]
"""(x_t (B, C, h, w), timesteps (B,), conditioning, w (B,) or None) -> model output like x_t."""

_LOG_SIGMA_MEAN, _LOG_SIGMA_SPREAD = -1.1, 2.0  # arXiv 2310.14189 Sec. 3.5


class Networks(NamedTuple):
    """The parts of a distillation; only `online`, and in its own part of the loss `critic`, receive a gradient."""

    online: Network
    target: Network
    teacher: Network
    critic: Network


class Points(NamedTuple):
    """The timesteps of a batch of B samples, as a method draws them. What each stands for is the method's to say."""

    t: Tensor
    """Where the online network looks, (B,) int64."""
    s: Tensor
    """Where it is compared with another network, alike."""
    end: Tensor
    """A further timestep, alike."""
    path: tuple[int, ...] = ()
    """Timesteps of the sampler before t, which is the same for the whole batch then."""
    noises: int = 0
    """How many noises a sample needs besides its first."""


@dataclass(frozen=True)
class Sample:
    """All that is given and drawn for a batch of B samples, on one device."""

    x0: Tensor
    """Clean latents (B, C, h, w)."""
    eps: Tensor
    """Their noise, alike."""
    t: Tensor
    """Noisy timesteps (B,) int64: where the online network looks."""
    s: Tensor
    """For consistency one skip below, at least 0: where the teacher jumps to and the target network looks. For `dmd2`
    where the two scores are compared."""
    end: Tensor
    """For consistency where the two predictions are compared, at most s; 0 for the plain one. For `dmd2` where the
    critic learns."""
    w: Tensor
    """Guidance (B,)."""
    conditioning: Conditioning
    """What the networks are given, (B, ...) tensors and dicts of them."""
    null_conditioning: Conditioning
    """The same of the empty prompt."""
    noises: Tensor
    """Further noises (B, M, C, h, w), as many as the method wants."""
    path: tuple[int, ...] = ()
    """Timesteps of the sampler before t."""
    student_turn: bool = True
    """Whether the student learns in this step; where there is a critic, that one learns in every step."""

    def part(self, rows: slice) -> Sample:
        """Some of the samples."""
        return Sample(**{f.name: _each(getattr(self, f.name), lambda v: v[rows]) for f in fields(self)})

    def to(self, device: torch.device) -> Sample:
        """The same on another device."""
        return Sample(
            **{f.name: _each(getattr(self, f.name), lambda v: v.to(device, non_blocking=True)) for f in fields(self)}
        )


def draw_timesteps(
    size: int, config: ConsistencyConfig, alphas_cumprod: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(t, s), each (B,) int64: t on the skipping grid, or shifted down by `grid_jitter`; s one skip below, at least 0.

    lognormal: grid point n has the share of a normal distribution of log sigma that lies between it and its
    predecessor (arXiv 2310.14189 Sec. 3.5).

    Raises:
        InputError: `original_steps` out of range, or an unknown sampling.
    """
    total = len(alphas_cumprod)
    if not 1 <= config.original_steps <= total:
        raise InputError(f"original_steps={config.original_steps} must be 1 to {total}")
    skip = total // config.original_steps
    if config.timestep_sampling == "uniform":
        n = torch.randint(1, config.original_steps + 1, (size,), generator=generator)
    elif config.timestep_sampling == "lognormal":
        grid = torch.arange(config.original_steps + 1) * skip - 1
        abar = alphas_cumprod.cpu().double()[grid.clamp(min=0)]
        log_sigma = ((1 - abar) / abar).log() / 2
        shares = torch.erf((log_sigma - _LOG_SIGMA_MEAN) / (math.sqrt(2) * _LOG_SIGMA_SPREAD)).diff()
        n = 1 + torch.multinomial(shares, size, replacement=True, generator=generator)
    else:
        raise InputError(
            f"unknown timestep_sampling {config.timestep_sampling!r}; choose {', '.join(TIMESTEP_SAMPLINGS)}"
        )
    t = n * skip - 1
    if config.grid_jitter:
        t = t - torch.randint(skip, (size,), generator=generator)
    return t, (t - skip).clamp(min=0)


def draw_guidance(size: int, config: MethodConfig, generator: torch.Generator) -> Tensor:
    """w of each sample, (B,), even over [w_min, w_max]."""
    return config.w_min + (config.w_max - config.w_min) * torch.rand(size, generator=generator)


def draw_noise(shape: torch.Size, config: MethodConfig, generator: torch.Generator) -> Tensor:
    """Noise (B, C, h, w), with `noise_offset` times another number for each whole channel."""
    eps = torch.randn(shape, generator=generator)
    if config.noise_offset:
        eps = eps + config.noise_offset * torch.randn(*shape[:2], 1, 1, generator=generator)
    return eps


def pair(x0: Tensor, eps: Tensor) -> Tensor:
    """The same noises in the order in which they lie nearest to the samples, (B, C, h, w): the assignment with the
    least sum of squared distances (minibatch optimal transport, arXiv 2302.00482 Sec. 3.2).

    Raises:
        InputError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise InputError("pair_noise needs scipy; install it, or leave pair_noise out") from error
    costs = torch.cdist(x0.flatten(1).double(), eps.flatten(1).double()).square()
    _, columns = linear_sum_assignment(costs.numpy())
    return eps[torch.from_numpy(columns)]


def at(alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """alphas_cumprod (T,) at whole or fractional timesteps (B,) -> (B, 1, 1, 1); linear in log sigma as samplers do."""
    if not t.is_floating_point():
        return alphas_cumprod[t].view(-1, 1, 1, 1)
    log_sigma = (((1 - alphas_cumprod) / alphas_cumprod).log()) / 2
    low = t.floor().long().clamp(0, len(alphas_cumprod) - 2)
    value = torch.lerp(log_sigma[low], log_sigma[low + 1], (t - low).to(log_sigma.dtype))
    return torch.sigmoid(-2 * value).view(-1, 1, 1, 1)


def guided_eps(
    teacher: Network, sample: Sample, alphas_cumprod: Tensor, prediction_type: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """The noise (1 + w) eps(c) - w eps(null) (Eq. 15) that the teacher sees, as a function of (x, t) and like x.

    Both halves of the guidance run in one batch of twice the size.
    """
    dtype = sample.x0.dtype

    def eps_of(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        output = teacher(x.to(dtype), t, conditioning, None)
        return to_eps(output.to(x.dtype), x, at(alphas_cumprod, t), prediction_type)

    scale = 1 + sample.w.to(alphas_cumprod.dtype)
    return guide(eps_of, sample.conditioning, sample.null_conditioning, scale)


def widen(tensor: Tensor) -> Tensor:
    """In double precision where there is one: with zero terminal SNR, eps to x0 multiplies rounding by 4519."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def teacher_jump(
    teacher: Network,
    x_t: Tensor,
    sample: Sample,
    alphas_cumprod: Tensor,
    config: TeacherJumpConfig,
    prediction_type: str,
) -> Tensor:
    """x_s, like x_t: one solver step along the augmented PF-ODE, whose noise is the guided one."""
    abar = widen(alphas_cumprod)
    guided = guided_eps(teacher, sample, abar, prediction_type)
    return solver_jump(guided, widen(x_t), sample.t, sample.s, abar, config.solver).to(x_t.dtype)


def predict(
    network: Network, x: Tensor, t: Tensor, sample: Sample, alphas_cumprod: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """(x0, eps) that a student sees in x at t, each like x."""
    output, abar = network(x, t, sample.conditioning, sample.w), at(alphas_cumprod, t)
    return to_x0(output, x, abar, prediction_type), to_eps(output, x, abar, prediction_type)


def consistency(
    network: Network, x: Tensor, t: Tensor, sample: Sample, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """f of Eq. 9, like x: the clean sample that a student sees in x at t."""
    return apply_boundary(predict(network, x, t, sample, alphas_cumprod, prediction_type)[0], x, t)


def noised(sample: Sample, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The samples with their noise at timesteps t."""
    return add_noise(sample.x0, sample.eps, at(alphas_cumprod, t))


def weighted_distance(
    guess: Tensor, aim: Tensor, t: Tensor, alphas_cumprod: Tensor, config: ConsistencyConfig
) -> Tensor:
    """The distance of each sample, (B,), times the weight of its timestep."""
    c = config.huber_c or adaptive_c(config.original_steps)
    return snr_weight(at(alphas_cumprod, t).flatten(), config) * distance(guess, aim, config.loss, c)


def snr_weight(abar: Tensor, config: ConsistencyConfig) -> Tensor:
    """Weight of a loss between clean samples at SNR = abar / (1 - abar), (B,) -> (B,).

    none: 1. min_snr: min(SNR, gamma) (arXiv 2303.09556 Sec. 3.4). truncated_snr: max(SNR, 1) (arXiv 2202.00512 Sec. 4).

    Raises:
        InputError: unknown weighting.
    """
    if config.weighting == "none":
        return torch.ones_like(abar)
    snr = abar / (1 - abar)
    if config.weighting == "min_snr":
        return snr.clamp(max=config.snr_gamma)
    if config.weighting == "truncated_snr":
        return snr.clamp(min=1)
    raise InputError(f"unknown weighting {config.weighting!r}; choose {', '.join(WEIGHTINGS)}")


def _each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _each(inner, function) for key, inner in value.items()}
    return function(value) if isinstance(value, Tensor) else value
