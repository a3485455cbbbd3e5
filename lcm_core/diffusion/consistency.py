"""A network in the one shape that samplers and hosts know: `model(x, sigma, **extra_args) -> denoised`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion, per_sample, to_x0


class Denoiser:
    """`denoiser(x, sigma, **extra_args) -> x0`, the form of k-diffusion.

    `network(x_t, t, **extra_args)` is any callable that takes samples (B, ...) in its own scale and timesteps (B,)
    float; `x` is at the sampler's scale (see `process`), and `sigma` is (B,). Nothing is read back from the device.
    """

    def __init__(self, network: Callable[..., Tensor], diffusion: Diffusion) -> None:
        self.network = network
        self.diffusion = diffusion

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """The model's x0, of the shape of x."""
        return self._predict(x, sigma, extra_args)[0].to(x.dtype)

    def _predict(self, x: Tensor, sigma: Tensor, extra_args: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        process = self.diffusion.process
        if sigma.shape != x.shape[:1]:
            sigma = sigma.expand(x.shape[0])
        timesteps = process.sigma_to_t(sigma)
        a, b = process.network_scales(per_sample(sigma, x))
        x_t = x if process.reaches_pure_noise else x * a  # a sampler's x is x0 + sigma eps there
        output = self.network(x_t if x_t.dtype == x.dtype else x_t.to(x.dtype), timesteps, **extra_args)
        return to_x0(output, x_t, a, b, self.diffusion.prediction_type), x_t, timesteps


class ConsistencyDenoiser(Denoiser):
    """A `Denoiser` that returns the consistency function f (arXiv 2310.04378 Eq. 9) instead of plain x0."""

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """f(x, sigma), like x."""
        x0, x_t, timesteps = self._predict(x, sigma, extra_args)
        f = self.diffusion.bounded(x0, x_t, timesteps)
        return f if f.dtype == x.dtype else f.to(x.dtype)
