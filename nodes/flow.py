"""Few-step sampling of flow models, x = (1 - s) x0 + s eps, by the words of a host's `model_sampling`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcm_core.diffusion.process import RectifiedFlow
from lcm_core.diffusion.samplers import Callback, NoiseSampler, sample_lcm, sample_tcd
from lcm_core.errors import InputError


def is_flow(sampling: Any) -> bool:
    """Whether a host's `model_sampling` mixes noise and image as flow models do.

    It is asked what it does: its class would say less, since hosts build new ones from these.
    """
    image, noise = _shares(sampling)
    return abs(image - 0.5) < 1e-4 and noise > 0


def check_noise(sampling: Any) -> None:
    """Refuse a `model_sampling` that adds noise neither as flow models do, nor as x0 + sigma eps.

    Raises:
        InputError: names it.
    """
    image, noise = _shares(sampling)
    if not is_flow(sampling) and max(abs(image - 1), abs(noise - 0.5)) > 1e-4:
        raise InputError(
            f"this MODEL ({name_of(sampling)}) adds noise in a way that LCM does not know; use the sampler made for it"
        )


def name_of(sampling: Any) -> str:
    """What a `model_sampling` is: hosts build its class of two, one for the noise levels and one for x0."""
    return " with ".join(base.__name__ for base in type(sampling).__bases__)


def _shares(sampling: Any) -> tuple[float, float]:
    """Of the image and of the noise in what a sampler starts from, half way."""
    if not hasattr(sampling, "noise_scaling"):
        return 0.0, 0.0
    none, one, s = torch.zeros(1), torch.ones(1), torch.tensor(0.5)
    mix = sampling.noise_scaling
    return float(mix(s, none.clone(), one.clone())), float(mix(s, one.clone(), none.clone()))  # it may write into them


def sample_flow(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    sampling: Any,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
    gamma: float | None = None,
) -> Tensor:
    """Multistep consistency sampling, or trajectory sampling, of a flow model.

    Args:
        model: `model(x, sigma, **extra_args) -> denoised`.
        x: (B, ...) at noise level sigmas[0], as the host mixed it.
        sigmas: (N + 1,) the s of each step, falling in [0, 1]; a last 0 ends without noise.
        sampling: the host's `model_sampling`, which may want its noise in another size.
        callback: called in every step with {"i", "x", "sigma", "sigma_hat", "denoised"}.
        noise_sampler: `noise_sampler(sigma, sigma_next)` gives noise like x; default `torch.randn_like`.
        gamma: share of fresh noise in each step, 0 to 1 (tcd); None jumps to x0 and takes all noise anew (lcm).
    """
    scale = getattr(sampling, "noise_scale", 1.0)

    def noise(s: Tensor, s_next: Tensor) -> Tensor:
        return scale * (noise_sampler(s, s_next) if noise_sampler else torch.randn_like(x))

    if gamma is None:
        return sample_lcm(model, x, sigmas, extra_args, callback, True, noise, RectifiedFlow())
    return sample_tcd(model, x, sigmas, extra_args, callback, True, noise, RectifiedFlow(), gamma)
