"""The GAN term of DMD2 (arXiv 2405.14867 Sec. 4.3): a small head on the critic tells real pictures from the student's.

The discriminator D is the middle block of the critic and that head; it sees noised latents and answers with a logit, so
that sigmoid(D) is how probable it is that they are real. Critic and head learn to tell them apart, in
`-log sigmoid(D(real)) - log(1 - sigmoid(D(fake)))`; the student learns to pass, in the non-saturating
`-log sigmoid(D(fake))`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lcm_core.diffusion.diffusion import Diffusion
from trainer.methods.shared import Asked, Conditioning, Network, Networks, Sample

HEAD_WEIGHT = 0.01
"""Weight of the discriminator's loss beside the critic's own, as in the authors' training scripts."""
_WIDTH, _GROUPS = 256, 32


def make_head(channels: int) -> nn.Sequential:
    """From features (B, C, h, w) of any size to logits (B, 1), which are 0 at first."""
    width = min(channels, _WIDTH)
    last = nn.Linear(width, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    groups = next(number for number in range(_GROUPS, 0, -1) if width % number == 0)
    convolution = nn.Conv2d(channels, width, 3, padding=1)
    return nn.Sequential(
        convolution, nn.GroupNorm(groups, width), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last
    )


def discriminator_on(critic: Network, block: nn.Module, head: nn.Module) -> Network:
    """A head on what a block inside of a critic makes while that is called; gives logits (B,)."""

    def run(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
        seen: list[Tensor] = []
        watch = block.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            critic(x, t, conditioning, w)
        finally:
            watch.remove()
        logits: Tensor = head(seen[0].float())
        return logits.flatten()

    return run


def asked(networks: Networks, sample: Sample) -> Asked:
    """The discriminator with a batch's conditioning and guidance, (x_t, t) -> logits (B,)."""
    return lambda x, t: networks.discriminator(x, t, sample.conditioning, sample.w)


def head_loss(discriminator: Asked, real: Tensor, fake: Tensor, t: Tensor) -> Tensor:
    """softplus(-D(real)) + softplus(D(fake)) of each sample, (B,); both are noised to t."""
    return functional.softplus(-discriminator(real, t)) + functional.softplus(discriminator(fake, t))


def student_loss(discriminator: Asked, x: Tensor, noise: Tensor, s: Tensor, d: Diffusion) -> Tensor:
    """softplus(-D(x noised to s)) of each sample, (B,), with a gradient in the pictures x alone: it goes through critic
    and head, but not into them."""
    here = x.detach().requires_grad_()
    with torch.enable_grad():
        losses = functional.softplus(-discriminator(d.noise(here, noise, s), s))
        [gradient] = torch.autograd.grad(losses.sum(), here)
    return losses.detach() + ((x - x.detach()) * gradient).flatten(1).sum(1)
