"""The pieces of which the methods' losses are made: what is drawn, how the networks are asked, the weights.

f, w and the jump are those of arXiv 2310.04378; what a timestep means, and what a network predicts, is `Diffusion`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.guidance import guide
from lcm_core.errors import InputError
from trainer.methods.config import ConsistencyConfig, MethodConfig
from trainer.methods.distances import adaptive_c, distance

Conditioning = dict[str, Any]
Network = Callable[[Tensor, Tensor, Conditioning, Tensor | None], Tensor]
"""(x_t (B, ...), timesteps (B,), conditioning, w (B,) or None) -> model output like x_t."""
Asked = Callable[[Tensor, Tensor], Tensor]
"""The same for a known batch: (x_t, timesteps) -> model output, like x_t."""

_LOG_SIGMA_MEAN, _LOG_SIGMA_SPREAD = -1.1, 2.0  # arXiv 2310.14189 Sec. 3.5


def absent(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
    """The network that a method has not."""
    raise RuntimeError("this method has no such network")


class Networks(NamedTuple):
    """The parts of a distillation; only `online`, and in their own part of the loss `critic` and `discriminator`,
    receive a gradient."""

    online: Network
    target: Network
    teacher: Network
    critic: Network
    discriminator: Network = absent
    """Gives a number for each sample, (B,), instead of a prediction: how real it looks, see `trainer.methods.gan`."""

    def given(self, sample: Sample, end: Tensor | None = None) -> AskedNetworks:
        """The networks with a batch's conditioning and guidance, the teacher with both halves of its guidance.

        Args:
            sample: the batch.
            end: where each jump ends, (B,) as a share of the training timesteps, for students that are told.
        """
        told = sample.conditioning if end is None else {**sample.conditioning, "end": end}

        def student(network: Network) -> Asked:
            return lambda x, t: network(x, t, told, sample.w)

        return AskedNetworks(
            student(self.online), student(self.target), guided_teacher(self.teacher, sample), student(self.critic)
        )


class AskedNetworks(NamedTuple):
    """`Networks` for one batch."""

    online: Asked
    target: Asked
    teacher: Asked
    critic: Asked


@dataclass(frozen=True)
class Pair:
    """The timesteps of a consistency method, each (B,)."""

    t: Tensor
    """Where the online network looks."""
    s: Tensor
    """One skip below, at least 0: where the teacher jumps to and the target network looks."""
    end: Tensor
    """Where the two predictions are compared, at most s; 0 for the plain method."""


@dataclass(frozen=True)
class Sample:
    """All that is given and drawn for a batch of B samples, on one device."""

    x0: Tensor
    """Clean latents (B, C, h, w), or of video (B, C, T, h, w)."""
    eps: Tensor
    """Their noise, of the same shape."""
    points: Any
    """The timesteps, and what else the method draws: its own record of (B, ...) tensors."""
    w: Tensor
    """Guidance (B,)."""
    conditioning: Conditioning
    """What the networks are given, (B, ...) tensors and dicts of them."""
    null_conditioning: Conditioning | None
    """The same of the empty prompt; None where the teacher reads w as an input of its own."""
    student_turn: bool = True
    """Whether the student is updated in this step; where there is a critic, that one is updated in every step."""

    def part(self, rows: slice) -> Sample:
        """Some of the samples."""
        return each(self, lambda value: value[rows])

    def to(self, device: torch.device) -> Sample:
        """The same on another device."""
        return each(self, lambda value: value.to(device, non_blocking=True))


def draw_pair(size: int, config: ConsistencyConfig, diffusion: Diffusion, generator: torch.Generator) -> Pair:
    """Two neighbours on the skipping grid, or shifted down by `grid_jitter`; the end is 0.

    lognormal: grid point n has the share of a normal distribution of log sigma = log(b / a) that lies between it and
    its predecessor (arXiv 2310.14189 Sec. 3.5).
    """
    steps, skip = diffusion.original_steps, diffusion.process.num_train_timesteps // diffusion.original_steps
    if config.timestep_sampling == "uniform":
        index = torch.randint(1, steps + 1, (size,), generator=generator)
    else:
        a, b = diffusion.process.coefficients(diffusion.grid(torch.arange(steps + 1)))
        log_sigma = (b.double() / a.double()).log()
        shares = torch.erf((log_sigma - _LOG_SIGMA_MEAN) / (math.sqrt(2) * _LOG_SIGMA_SPREAD)).diff()
        index = 1 + torch.multinomial(shares, size, replacement=True, generator=generator)
    if config.grid_jitter:
        index = index - torch.randint(skip, (size,), generator=generator).double() / skip
    t, s = diffusion.grid(index), diffusion.grid(index - 1)
    return Pair(t, s, torch.zeros_like(s))


def draw_guidance(size: int, config: MethodConfig, generator: torch.Generator) -> Tensor:
    """w of each sample, (B,), even over [w_min, w_max]."""
    return config.w_min + (config.w_max - config.w_min) * torch.rand(size, generator=generator)


def draw_noise(shape: torch.Size, config: MethodConfig, generator: torch.Generator) -> Tensor:
    """Noise (B, C, ...), with `noise_offset` times another number for each whole channel."""
    eps = torch.randn(shape, generator=generator)
    if config.noise_offset:
        whole = (*shape[:2], *[1] * (len(shape) - 2))
        eps = eps + config.noise_offset * torch.randn(whole, generator=generator)
    return eps


def pair_noise(x0: Tensor, eps: Tensor) -> Tensor:
    """The same noises in the order in which they lie nearest to the samples, (B, ...): the assignment with the least
    sum of squared distances (minibatch optimal transport, arXiv 2302.00482 Sec. 3.2).

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


def guided_teacher(teacher: Network, sample: Sample) -> Asked:
    """(1 + w) output(c) - w output(null) (Eq. 15), as a function of (x, t) and like x, at least float32.

    What a network predicts is linear in the noise that it sees, so that guiding the outputs guides the noise. Both
    halves run in one batch of twice the size. A teacher that reads w itself needs none of this.
    """
    if sample.null_conditioning is None:
        return lambda x, t: teacher(x.to(sample.x0.dtype), t, sample.conditioning, sample.w).to(x.dtype)

    def output(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        return teacher(x.to(sample.x0.dtype), t, conditioning, None).to(x.dtype)

    return guide(output, sample.conditioning, sample.null_conditioning, 1 + sample.w)


def weighted_distance(guess: Tensor, aim: Tensor, t: Tensor, diffusion: Diffusion, config: ConsistencyConfig) -> Tensor:
    """The distance of each sample, (B,), times the weight of its timestep."""
    c = config.huber_c or adaptive_c(config.original_steps)
    return snr_weight(diffusion.snr(t), config).to(guess.dtype) * distance(guess, aim, config.loss, c)


def snr_weight(snr: Tensor, config: ConsistencyConfig) -> Tensor:
    """Weight of a loss between clean samples at SNR = a^2 / b^2, (B,) -> (B,).

    none: 1. min_snr: min(SNR, gamma) (arXiv 2303.09556 Sec. 3.4). truncated_snr: max(SNR, 1) (arXiv 2202.00512 Sec. 4).
    """
    if config.weighting == "none":
        return torch.ones_like(snr)
    return snr.clamp(max=config.snr_gamma) if config.weighting == "min_snr" else snr.clamp(min=1)


def each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of every tensor in nested records and dicts; anything else as it is."""
    if isinstance(value, dict):
        return {key: each(inner, function) for key, inner in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: each(getattr(value, f.name), function) for f in fields(value)})
    return function(value) if isinstance(value, Tensor) else value
