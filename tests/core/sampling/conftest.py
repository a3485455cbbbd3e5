"""A tiny network, and how diffusers' loop and ours sample it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcm_core.diffusion.process import VariancePreserving
from lcm_core.diffusion.samplers import initial_latents, initial_noise, seeded_noise_sampler
from lcm_core.diffusion.schedule import get_alphas_cumprod

SHAPE = (4, 8, 8)
SEED = 11


class TinyNet(nn.Module):
    """A nonlinear stand-in for a U-Net: it depends on x, on t, on the text and on the guidance embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.into, self.out = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.time, self.text, self.guidance = nn.Linear(2, 8), nn.Linear(6, 8), nn.Linear(256, 8)

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor | None = None, timestep_cond: Tensor | None = None
    ) -> Tensor:
        phase = t.float().reshape(-1, 1) * torch.tensor([0.001, 0.02])
        bias = self.time(phase.sin())
        if encoder_hidden_states is not None:
            bias = bias + self.text(encoder_hidden_states.mean(1))
        if timestep_cond is not None:
            bias = bias + self.guidance(timestep_cond)
        return self.out(torch.tanh(self.into(x) + bias[:, :, None, None]))


@pytest.fixture(scope="module")
def net() -> TinyNet:
    return TinyNet().requires_grad_(False)


@pytest.fixture(scope="module")
def schedule() -> VariancePreserving:
    return VariancePreserving(get_alphas_cumprod())


def image_latents() -> Tensor:
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(99))


def reference(scheduler: Any, net: nn.Module, strength: float = 1.0, **step_args: Any) -> Tensor:
    """diffusers' own loop; the generator gives the first latents and then the noise of each step."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(1, *SHAPE, generator=generator)
    if strength < 1:
        x = scheduler.add_noise(image_latents(), x, scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x, generator=generator, **step_args).prev_sample
    return x


def ours(sampler: Callable[..., Tensor], model: Any, sigmas: Tensor, strength: float = 1.0, **args: Any) -> Tensor:
    x0 = image_latents() if strength < 1 else None
    x = initial_latents(initial_noise([SEED], SHAPE), sigmas[0], x0, args.get("process"))
    return sampler(model, x, sigmas, noise_sampler=seeded_noise_sampler([SEED], SHAPE), disable=True, **args)


def assert_parity(actual: Tensor, expected: Tensor, bar: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=bar * float(expected.abs().max()))
