"""From what a network predicts to x0, and the consistency function of latent consistency models (arXiv 2310.04378).

`abar` is alphas_cumprod at the timestep of each sample; it must broadcast against the samples, e.g. (B, 1, 1, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcm_core.diffusion.schedule import NoiseSchedule
from lcm_core.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def boundary_scalings(
    timesteps: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) at `timesteps`, each of the same shape; (1, 0) at t = 0, so that f(x, 0) = x.

    arXiv 2310.04378 Sec. 4.1 and App. C: c_skip = sd^2 / ((s t)^2 + sd^2), c_out = s t / sqrt((s t)^2 + sd^2).
    """
    scaled = timesteps * timestep_scaling
    norm = scaled * scaled + sigma_data**2
    return sigma_data**2 / norm, scaled / norm.sqrt()


def add_noise(x0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) eps, like x0 (arXiv 2006.11239 Eq. 4)."""
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps


def to_x0(model_output: Tensor, x_t: Tensor, abar: Tensor, prediction_type: str) -> Tensor:
    """x0 from a prediction at x_t, like x_t.

    epsilon: (x_t - sqrt(1 - abar) out) / sqrt(abar); v_prediction: sqrt(abar) x_t - sqrt(1 - abar) out (arXiv
    2202.00512 App. D); sample: out.

    Raises:
        InputError: unknown prediction type.
    """
    return _to_x0(model_output, x_t, abar.sqrt(), (1 - abar).sqrt(), prediction_type)


def to_eps(model_output: Tensor, x_t: Tensor, abar: Tensor, prediction_type: str) -> Tensor:
    """The noise from a prediction at x_t, like x_t.

    epsilon: out; v_prediction: sqrt(abar) out + sqrt(1 - abar) x_t; sample: (x_t - sqrt(abar) out) / sqrt(1 - abar).

    Raises:
        InputError: unknown prediction type.
    """
    if prediction_type == "epsilon":
        return model_output
    if prediction_type == "v_prediction":
        return abar.sqrt() * model_output + (1 - abar).sqrt() * x_t
    if prediction_type == "sample":
        return (x_t - abar.sqrt() * model_output) / (1 - abar).sqrt()
    raise _unknown(prediction_type)


def prediction_target(x0: Tensor, eps: Tensor, abar: Tensor, prediction_type: str) -> Tensor:
    """What a perfect network predicts at add_noise(x0, eps, abar), like x0: the target of a diffusion loss.

    epsilon: eps; v_prediction: sqrt(abar) eps - sqrt(1 - abar) x0 (arXiv 2202.00512 App. D); sample: x0.

    Raises:
        InputError: unknown prediction type.
    """
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        return abar.sqrt() * eps - (1 - abar).sqrt() * x0
    if prediction_type == "sample":
        return x0
    raise _unknown(prediction_type)


def apply_boundary(
    x0: Tensor, x_t: Tensor, timesteps: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> Tensor:
    """c_skip(t) x_t + c_out(t) x0: the consistency function once x0 is known (arXiv 2310.04378 Eq. 9).

    Args:
        x0, x_t: (B, ...), x_t scaled to unit variance (variance-preserving).
        timesteps: (B,).
    """
    c_skip, c_out = boundary_scalings(_like(timesteps, x_t), sigma_data, timestep_scaling)
    return c_skip * x_t + c_out * x0


def consistency_function(
    model_output: Tensor,
    x_t: Tensor,
    timesteps: Tensor,
    abar: Tensor,
    prediction_type: str = "epsilon",
    sigma_data: float = 0.5,
    timestep_scaling: float = 10.0,
) -> Tensor:
    """f(x_t, t): the clean sample that a consistency model predicts, like x_t (arXiv 2310.04378 Eq. 9).

    Args:
        model_output, x_t: (B, ...).
        timesteps: (B,); abar: alphas_cumprod at those, broadcastable to x_t.

    Raises:
        InputError: unknown prediction type.
    """
    x0 = to_x0(model_output, x_t, abar, prediction_type)
    return apply_boundary(x0, x_t, timesteps, sigma_data, timestep_scaling)


class Denoiser:
    """A network in the one shape that samplers know: `denoiser(x, sigma, **extra_args) -> x0`.

    `unet(x_t, t, **extra_args)` is any callable that takes unit-variance samples (B, ...) and timesteps (B,) float;
    `x` is x0 + sigma * eps, and `sigma` is (B,). Nothing is read back from the device.

    Raises:
        InputError: unknown prediction type; or "epsilon" with a zero-terminal-SNR schedule, where the last timestep
            has no signal left and x0 = (x_t - eps) / 0.
    """

    def __init__(self, unet: Callable[..., Tensor], schedule: NoiseSchedule, prediction_type: str = "epsilon") -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise _unknown(prediction_type)
        if prediction_type == "epsilon" and schedule.zero_terminal_snr:
            raise InputError(
                "prediction_type 'epsilon' is undefined on a zero-terminal-SNR schedule; "
                "use 'v_prediction' or 'sample', or a schedule without zero_terminal_snr"
            )
        self.unet = unet
        self.schedule = schedule
        self.prediction_type = prediction_type

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """x0, like x."""
        return self._predict(x, sigma, extra_args)[0].to(x.dtype)

    def _predict(self, x: Tensor, sigma: Tensor, extra_args: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        sigma = sigma.expand(x.shape[0])
        timesteps = self.schedule.sigma_to_t(sigma)
        level = _like(sigma, x)
        c_in = torch.rsqrt(level * level + 1)  # sqrt(abar)
        x_t = x * c_in
        model_output = self.unet(x_t.to(x.dtype), timesteps, **extra_args)
        return _to_x0(model_output, x_t, c_in, level * c_in, self.prediction_type), x_t, timesteps


class ConsistencyDenoiser(Denoiser):
    """A `Denoiser` that returns the consistency function f (arXiv 2310.04378 Eq. 9) instead of plain x0."""

    def __init__(
        self,
        unet: Callable[..., Tensor],
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        sigma_data: float = 0.5,
        timestep_scaling: float = 10.0,
    ) -> None:
        super().__init__(unet, schedule, prediction_type)
        self.sigma_data = sigma_data
        self.timestep_scaling = timestep_scaling

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """f(x, sigma), like x."""
        x0, x_t, timesteps = self._predict(x, sigma, extra_args)
        return apply_boundary(x0, x_t, timesteps, self.sigma_data, self.timestep_scaling).to(x.dtype)


def _to_x0(
    model_output: Tensor,
    x_t: Tensor,
    sqrt_alphas_cumprod: Tensor,
    sqrt_one_minus_alphas_cumprod: Tensor,
    prediction_type: str,
) -> Tensor:
    if prediction_type == "epsilon":
        return (x_t - sqrt_one_minus_alphas_cumprod * model_output) / sqrt_alphas_cumprod
    if prediction_type == "v_prediction":
        return sqrt_alphas_cumprod * x_t - sqrt_one_minus_alphas_cumprod * model_output
    if prediction_type == "sample":
        return model_output
    raise _unknown(prediction_type)


def _like(per_sample: Tensor, x: Tensor) -> Tensor:
    return per_sample.reshape(-1, *[1] * (x.ndim - 1))  # (B,) -> (B, 1, 1, 1)


def _unknown(prediction_type: str) -> InputError:
    return InputError(f"unknown prediction_type {prediction_type!r}; choose {', '.join(PREDICTION_TYPES)}")
