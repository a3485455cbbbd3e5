"""Improved distribution matching distillation (DMD2, arXiv 2405.14867; DMD, arXiv 2311.18828).

Where a picture of the student is noised again, the guided teacher's guess of the clean one says what real pictures are
like, and the critic's guess what the student's are like. Their difference moves the picture. The critic is a second
copy of the teacher, which learns to denoise what the student paints. No data is looked at, only captions.

The paper's GAN loss (Sec. 4.3), which also looks at real pictures, is left out: it needs a discriminator of its own.

The student sees what a sampler would show it: its own pictures of the steps before, noised again (backward simulation,
Sec. 4.5 of DMD2). Each batch is one of `phases`, half as many, ..., one steps, so that one student serves them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcm_core.diffusion.consistency import add_noise, prediction_target, to_x0
from lcm_core.diffusion.schedule import get_timesteps_lcm
from trainer.methods.config import Dmd2Config
from trainer.methods.shared import (
    Networks,
    Points,
    Sample,
    at,
    consistency,
    guided_eps,
    predict,
    widen,
)

_LEAST, _MOST = 0.02, 0.98
"""Shares of the timesteps between which the scores are compared: at the ends they say nothing."""


def draw(size: int, config: Dmd2Config, alphas_cumprod: Tensor, generator: torch.Generator) -> Points:
    """t, one of a sampler's timesteps, and the path to it; s, where the scores are compared; end, where the critic
    learns."""
    total = len(alphas_cumprod)
    halvings = int(torch.randint(config.phases.bit_length(), (), generator=generator))
    steps = config.phases >> halvings
    visited = get_timesteps_lcm(steps, config.original_steps, 1.0, total).tolist()
    number = int(torch.randint(steps, (), generator=generator))
    s = torch.randint(round(_LEAST * total), round(_MOST * total) + 1, (size,), generator=generator)
    end = torch.randint(total, (size,), generator=generator)
    t = torch.full((size,), visited[number])
    return Points(t, s, end, tuple(visited[:number]), noises=config.phases + 1)


def loss(
    networks: Networks, sample: Sample, alphas_cumprod: Tensor, config: Dmd2Config, prediction_type: str
) -> Tensor:
    """The critic's loss of each sample, and in the student's turn the student's, (B,)."""
    x_t = simulate(networks, sample, alphas_cumprod, prediction_type)
    with torch.set_grad_enabled(sample.student_turn):
        x = consistency(networks.online, x_t, sample.t, sample, alphas_cumprod, prediction_type)
    total = critic_loss(networks, x.detach(), sample, alphas_cumprod, prediction_type)
    if sample.student_turn:
        total = total + matching_loss(networks, x, sample, alphas_cumprod, prediction_type)
    return total


@torch.no_grad()
def simulate(networks: Networks, sample: Sample, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """x_t as the student's own sampler comes to it from noise: in each step the clean sample, noised again."""
    ones = torch.ones_like(sample.t)
    times = [*(ones * t for t in sample.path), sample.t]
    x = add_noise(torch.zeros_like(sample.eps), sample.eps, at(alphas_cumprod, times[0]))
    for number, t in enumerate(times[1:]):
        x0 = consistency(networks.online, x, times[number], sample, alphas_cumprod, prediction_type)
        x = add_noise(x0, sample.noises[:, number], at(alphas_cumprod, t))
    return x


def critic_loss(networks: Networks, x: Tensor, sample: Sample, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """The denoising loss on the student's pictures x, (B,), in what the teacher predicts (Eq. 6 of DMD)."""
    eps, abar = sample.noises[:, -1], at(alphas_cumprod, sample.end)
    output = networks.critic(add_noise(x, eps, abar), sample.end, sample.conditioning, sample.w)
    return (output - prediction_target(x, eps, abar, prediction_type)).square().flatten(1).mean(1)


def matching_loss(
    networks: Networks, x: Tensor, sample: Sample, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """|x - sg(x - g)|^2 / 2 of each sample, (B,), whose gradient in x is g / elements (Eqs. 7 and 8 of DMD).

    g = (x0_critic(x_s) - x0_teacher(x_s)) / mean|x - x0_teacher(x_s)|, with x_s the pictures noised to s.
    """
    with torch.no_grad():
        wide = widen(alphas_cumprod)
        x_s = add_noise(x, sample.noises[:, -2], at(alphas_cumprod, sample.s))
        eps = guided_eps(networks.teacher, sample, wide, prediction_type)(widen(x_s), sample.s)
        real = to_x0(eps, widen(x_s), at(wide, sample.s), "epsilon").to(x.dtype)
        fake, _ = predict(networks.critic, x_s, sample.s, sample, alphas_cumprod, prediction_type)
        size = (x - real).abs().mean((1, 2, 3), keepdim=True)
        aim = x - (fake - real) / size
    return (x - aim).square().flatten(1).mean(1) / 2
