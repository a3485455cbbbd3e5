"""Improved distribution matching distillation (DMD2, arXiv 2405.14867; DMD, arXiv 2311.18828).

Where a picture of the student is noised again, the guided teacher's guess of the clean one says what real pictures are
like, and the critic's guess what the student's are like. Their difference moves the picture. The critic is a second
copy of the teacher, which learns to denoise what the student paints. Of the data, captions alone are looked at.

With `gan_weight` real pictures have their say too (Sec. 4.3): a head on the critic tells them from the student's, see
`trainer.methods.gan`.

The student sees what a sampler would show it: its own pictures of the steps before, noised again (backward simulation,
Sec. 4.5 of DMD2). Each batch is one of `phases`, half as many, ..., one steps, so that one student serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_timesteps_lcm
from trainer.methods import gan, lcd
from trainer.methods.config import DistributionConfig, Dmd2Config
from trainer.methods.shared import Asked, Networks, Pair, Sample, draw_pair

_LEAST, _MOST = 0.02, 0.98
"""Shares of the timesteps between which the scores are compared: at the ends they say nothing."""


@dataclass(frozen=True)
class Simulation:
    """What is drawn for a batch: how the student comes to its pictures, and where they are looked at."""

    path: Tensor
    """Timesteps of the sampler up to the one that is trained, (B, N), the same in every row."""
    score_t: Tensor
    """Where the scores of teacher and critic are compared, (B,)."""
    critic_t: Tensor
    """Where the critic is trained, (B,)."""
    path_noise: Tensor
    """Fresh noise of each step of the path behind the first, (B, N - 1, ...)."""
    score_noise: Tensor
    """Noise at `score_t`, (B, ...)."""
    critic_noise: Tensor
    """Noise at `critic_t`, (B, ...)."""
    pair: Pair
    """Two neighbours on the grid, for the share of consistency loss."""
    real_noise: Tensor | None = None
    """Noise on real pictures at `critic_t`, (B, ...), where the student has a GAN term."""


def draw(
    size: int, config: Dmd2Config, diffusion: Diffusion, generator: torch.Generator, shape: torch.Size
) -> Simulation:
    """A path of one of the numbers of steps that the student serves, cut off at one of them; `shape` is a sample's."""
    path, _ = draw_path(size, config, diffusion, generator)
    score_t = diffusion.process.draw(size, generator, _LEAST, _MOST)
    critic_t = diffusion.process.draw(size, generator)
    noises = torch.randn(size, path.shape[1] + 1, *shape, generator=generator)
    pair = draw_pair(size, config.consistency(), diffusion, generator)
    real = torch.randn(size, *shape, generator=generator) if config.gan_weight else None
    return Simulation(path, score_t, critic_t, noises[:, :-2], noises[:, -2], noises[:, -1], pair, real)


def draw_path(
    size: int, config: DistributionConfig, diffusion: Diffusion, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The timesteps of a sampler of `phases`, half as many, ..., or one steps up to one of them, (size, N), and where
    that step lands, (size,)."""
    steps = config.phases >> int(torch.randint(config.phases.bit_length(), (), generator=generator))
    visited = get_timesteps_lcm(steps, diffusion.original_steps, process=diffusion.process)
    length = 1 + int(torch.randint(steps, (), generator=generator))
    end = visited[length] if length < steps else torch.zeros_like(visited[0])
    return visited[:length].expand(size, length), end.expand(size)


def loss(networks: Networks, sample: Sample, d: Diffusion, config: Dmd2Config) -> Tensor:
    """The critic's loss of each sample, and in the student's turn the student's, (B,)."""
    online, _, teacher, critic = networks.given(sample)
    x_t, t = simulate(online, sample, d), sample.points.path[:, -1]
    with torch.set_grad_enabled(sample.student_turn):
        x = d.f(online(x_t, t), x_t, t)
    total = critic_loss(critic, x.detach(), sample, d) + discriminator_loss(networks, x.detach(), sample, d, config)
    if not sample.student_turn:
        return total
    s, noise = sample.points.score_t, sample.points.score_noise
    matching = matching_loss(teacher, critic, x, d.noise(x.detach(), noise, s), s, d)
    matching = matching + gan_term(networks, x, sample, d, config)
    return total + guard(matching, networks, sample, d, config)


@torch.no_grad()
def simulate(online: Asked, sample: Sample, d: Diffusion) -> Tensor:
    """x_t as the student's own sampler comes to it from noise: in each step the clean sample, noised again."""
    times = sample.points.path.unbind(1)
    x = d.noise(torch.zeros_like(sample.eps), sample.eps, times[0])
    for before, t, noise in zip(times, times[1:], sample.points.path_noise.unbind(1), strict=False):
        x = d.noise(d.f(online(x, before), x, before), noise, t)
    return x


def critic_loss(critic: Asked, x: Tensor, sample: Sample, d: Diffusion) -> Tensor:
    """The denoising loss on the student's pictures x, (B,), in what the teacher predicts (Eq. 6 of DMD)."""
    eps, t = sample.points.critic_noise, sample.points.critic_t
    return (critic(d.noise(x, eps, t), t) - d.target(x, eps, t)).square().flatten(1).mean(1)


def matching_loss(teacher: Asked, critic: Asked, x: Tensor, x_s: Tensor, s: Tensor, d: Diffusion) -> Tensor:
    """|x - sg(x - g)|^2 / 2 of each sample, (B,), whose gradient in x is g / elements (Eqs. 7 and 8 of DMD).

    g = (x0_critic(x_s) - x0_teacher(x_s)) / mean|x - x0_teacher(x_s)|, with x_s the pictures x noised to s.
    """
    with torch.no_grad():
        real, fake = (d.x0(network(x_s, s), x_s, s) for network in (teacher, critic))
        size = (x - real).abs().flatten(1).mean(1).view(-1, *[1] * (x.ndim - 1))
        aim = x - (fake - real) / size
    return (x - aim).square().flatten(1).mean(1) / 2


def discriminator_loss(
    networks: Networks, x: Tensor, sample: Sample, d: Diffusion, config: Dmd2Config
) -> Tensor | float:
    """What the head on the critic learns by, from real pictures and the student's x, (B,); 0 without a head."""
    if not config.gan_weight:
        return 0.0
    points, t = sample.points, sample.points.critic_t
    real, fake = d.noise(sample.x0, points.real_noise, t), d.noise(x, points.critic_noise, t)
    return gan.HEAD_WEIGHT * gan.head_loss(gan.asked(networks, sample), real, fake, t)


def gan_term(networks: Networks, x: Tensor, sample: Sample, d: Diffusion, config: Dmd2Config) -> Tensor | float:
    """The weighted part of the student's loss by which its pictures x pass for real ones, (B,); 0 without a head."""
    if not config.gan_weight:
        return 0.0
    points, discriminator = sample.points, gan.asked(networks, sample)
    return config.gan_weight * gan.student_loss(discriminator, x, points.score_noise, points.score_t, d)


def guard(matching: Tensor, networks: Networks, sample: Sample, d: Diffusion, config: DistributionConfig) -> Tensor:
    """The student's loss of each sample, (B,), with `consistency_share` of it that of `lcd`.

    Matching distributions alone may end in few pictures that are all good; consistency ties each noise to a picture of
    its own.
    """
    share = config.consistency_share
    if share == 0:
        return matching
    neighbours = replace(sample, points=sample.points.pair)
    return (1 - share) * matching + share * lcd.loss(networks, neighbours, d, config.consistency())
