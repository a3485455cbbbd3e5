"""Trajectory distribution matching (TDM, arXiv 2503.06674): dmd2 on each part of a deterministic trajectory.

The student comes from noise in plain jumps, DDIM's or Euler's. Where it has landed, noise leads back up to a point of
the part that it has just jumped over, and there teacher and critic are compared, as in `dmd2`. No fresh noise goes into
its path, so it is sampled by an ordinary Euler sampler. No data is looked at, only captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from trainer.methods.config import TdmConfig
from trainer.methods.dmd2 import draw_path, guard, matching_loss
from trainer.methods.shared import Asked, Networks, Pair, Sample, draw_pair

_LEAST = 0.02
"""Share of a part, from its lower end, in which nothing is compared: hardly any noise lies on what was landed on."""


@dataclass(frozen=True)
class Trajectory:
    """What is drawn for a batch: how far the student goes, and where its pictures are looked at."""

    path: Tensor
    """Timesteps of the sampler up to the one that is trained, (B, N), the same in every row."""
    end: Tensor
    """Where the trained step lands, (B,)."""
    score_t: Tensor
    """Where teacher and critic are compared and the critic is trained, (B,), above `end` and at most the last of
    `path`."""
    score_noise: Tensor
    """Noise that leads up from `end` to `score_t`, (B, ...)."""
    pair: Pair
    """Two neighbours on the grid, for the share of consistency loss."""


def draw(
    size: int, config: TdmConfig, diffusion: Diffusion, generator: torch.Generator, shape: torch.Size
) -> Trajectory:
    """A path of one of the numbers of steps that the student serves, cut off at one of them; `shape` is a sample's."""
    path, end = draw_path(size, config, diffusion, generator)
    share = _LEAST + (1 - _LEAST) * torch.rand(size, generator=generator, dtype=torch.float64)
    score_t = end + (path[:, -1] - end) * share
    if not path.is_floating_point():
        score_t = score_t.ceil().long()
    noise = torch.randn(size, *shape, generator=generator)
    return Trajectory(path, end, score_t, noise, draw_pair(size, config.consistency(), diffusion, generator))


def loss(networks: Networks, sample: Sample, d: Diffusion, config: TdmConfig) -> Tensor:
    """The critic's loss of each sample, and in the student's turn the student's, (B,)."""
    online, _, teacher, critic = networks.given(sample)
    x_t, t, end, tau = simulate(online, sample, d), sample.points.path[:, -1], sample.points.end, sample.points.score_t
    with torch.set_grad_enabled(sample.student_turn):
        output = online(x_t, t)
        x = d.x0(output, x_t, t)
    x_tau = climb(d.jump(output.detach(), x_t, t, end), end, tau, sample.points.score_noise, d)
    total = critic_loss(critic, x.detach(), x_tau, tau, d)
    if not sample.student_turn:
        return total
    return total + guard(matching_loss(teacher, critic, x, x_tau, tau, d), networks, sample, d, config)


@torch.no_grad()
def simulate(online: Asked, sample: Sample, d: Diffusion) -> Tensor:
    """x_t as plain jumps of the student lead to it from noise."""
    times = sample.points.path.unbind(1)
    x = d.noise(torch.zeros_like(sample.eps), sample.eps, times[0])
    for before, t in pairwise(times):
        x = d.jump(online(x, before), x, before, t)
    return x


def climb(x_s: Tensor, s: Tensor, t: Tensor, noise: Tensor, d: Diffusion) -> Tensor:
    """x_t of the forward process that is at x_s: (a_t / a_s) x_s + sqrt(b_t^2 - (a_t / a_s)^2 b_s^2) noise."""
    (a_s, b_s), (a_t, b_t) = d.scales(s, x_s), d.scales(t, x_s)
    ratio = a_t / a_s
    return ratio * x_s + (b_t**2 - (ratio * b_s) ** 2).clamp(min=0).sqrt() * noise


def critic_loss(critic: Asked, x: Tensor, x_tau: Tensor, tau: Tensor, d: Diffusion) -> Tensor:
    """The denoising loss on the student's pictures x, (B,), where the noise in x_tau is what is not of x."""
    a, b = d.scales(tau, x)
    return (critic(x_tau, tau) - d.target(x, (x_tau - a * x) / b, tau)).square().flatten(1).mean(1)
