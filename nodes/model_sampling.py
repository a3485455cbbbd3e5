"""What a host's `model_sampling` does, as lcm_core's `Diffusion`.

It is asked for numbers, by the words that the host itself samples with; its class would say less, since hosts and their
nodes build new ones from these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.process import RectifiedFlow, VariancePreserving, abar_from_sigma
from lcm_core.diffusion.samplers import Callback, NoiseSampler, sample_lcm, sample_tcd
from lcm_core.errors import InputError

_CLOSE = 1e-3  # hosts answer in float32, and some of them in half precision
Parts = tuple[float, float]
"""What two tensors are multiplied by where a host adds them up."""


def diffusion_of(sampling: Any) -> Diffusion:
    """The noise process of a host's `model_sampling`, and what its network predicts.

    Raises:
        InputError: neither a flow nor a variance-preserving process with timesteps; names it.
    """
    try:
        found = _flow(sampling) or _variance_preserving(sampling)
    except (AttributeError, TypeError, NotImplementedError):  # it does not know these words
        found = None
    if found is None:
        raise InputError(
            f"this MODEL ({name_of(sampling)}) adds noise in a way that LCM does not know; use the sampler made for it"
        )
    return found


def name_of(sampling: Any) -> str:
    """What a `model_sampling` is: hosts build its class of two, one for the noise levels and one for x0."""
    return " with ".join(base.__name__ for base in type(sampling).__bases__)


def noise_scale_of(sampling: Any) -> float:
    """The spread of a flow model's noise, which some models want larger than 1."""
    return float(getattr(sampling, "noise_scale", 1.0))


def sample_flow(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    noise_scale: float = 1.0,
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
        noise_scale: see `noise_scale_of`.
        callback: called in every step with {"i", "x", "sigma", "sigma_hat", "denoised"}.
        noise_sampler: `noise_sampler(sigma, sigma_next)` gives noise like x; default `torch.randn_like`.
        gamma: share of fresh noise in each step, 0 to 1 (tcd); None jumps to x0 and takes all noise anew (lcm).
    """

    def noise(s: Tensor, s_next: Tensor) -> Tensor:
        return noise_scale * (noise_sampler(s, s_next) if noise_sampler else torch.randn_like(x))

    if gamma is None:
        return sample_lcm(model, x, sigmas, extra_args, callback, True, noise, RectifiedFlow())
    return sample_tcd(model, x, sigmas, extra_args, callback, True, noise, RectifiedFlow(), gamma)


def _flow(sampling: Any) -> Diffusion | None:
    """x = (1 - s) x0 + s eps, as it is, into a network that answers eps - x0; or None."""
    scale = noise_scale_of(sampling)
    levels = ((_mixture(sampling, s), _denoised(sampling, s), s) for s in (0.25, 0.5))
    if not all(_same(mix, (1 - s, s * scale)) and _same(x0, (1, -s)) for mix, x0, s in levels):
        return None
    shift = _shift(sampling)
    if shift is None or not math.isclose(_input(sampling, 0.5), 1, abs_tol=_CLOSE):
        return None
    return Diffusion(RectifiedFlow(shift), "flow")


def _shift(sampling: Any) -> float | None:
    """alpha of s = alpha u / (1 + (alpha - 1) u), from the level that lies half way; None where others do not fit."""
    half = float(sampling.percent_to_sigma(0.5))
    if not 0 < half < 1:
        return None
    process = RectifiedFlow(half / (1 - half))
    others = torch.tensor([0.25, 0.75], dtype=torch.float64)
    given = tuple(float(sampling.percent_to_sigma(1 - u)) for u in others.tolist())
    return process.shift if _same(given, tuple(process.shifted(others).tolist())) else None


def _variance_preserving(sampling: Any) -> Diffusion | None:
    """x = x0 + sigma eps into a network that is asked at the place of sigma in a table; or None."""
    sigma = 2.0
    root = math.sqrt(sigma * sigma + 1)
    kinds = {
        "epsilon": (1.0, -sigma),
        "v_prediction": (1 / root**2, -sigma / root),
        "sample": (0.0, 1.0),
    }
    x0 = _denoised(sampling, sigma)
    kind = next((name for name, parts in kinds.items() if _same(x0, parts)), None)
    if kind is None or not _same(_mixture(sampling, sigma), (1, sigma)):
        return None
    table = sampling.sigmas.detach().cpu().double()
    places = torch.tensor([0, len(table) // 2, len(table) - 1])
    at_places = sampling.timestep(table[places].float()).cpu().double()
    scaled = math.isclose(_input(sampling, sigma), 1 / root, abs_tol=_CLOSE)
    if len(table) != sampling.num_timesteps or not scaled or not torch.allclose(at_places, places.double(), atol=0.01):
        return None
    return Diffusion(VariancePreserving(abar_from_sigma(table)), kind)


def _mixture(sampling: Any, sigma: float) -> Parts:
    """The shares of image and noise in what a sampler starts from."""
    level = torch.tensor(sigma)
    return _parts(lambda image, noise: sampling.noise_scaling(level, noise, image))


def _denoised(sampling: Any, sigma: float) -> Parts:
    """The shares of a sampler's x and of the network's output in x0."""
    level = torch.tensor([sigma])
    return _parts(lambda x, output: sampling.calculate_denoised(level, output, x))


def _input(sampling: Any, sigma: float) -> float:
    """What a sampler's x is multiplied by for the network."""
    return float(sampling.calculate_input(torch.tensor([sigma]), torch.ones(1)))


def _parts(mix: Callable[[Tensor, Tensor], Tensor]) -> Parts:
    # each call has tensors of its own: hosts may write into them
    return float(mix(torch.ones(1), torch.zeros(1))), float(mix(torch.zeros(1), torch.ones(1)))


def _same(found: tuple[float, ...], expected: tuple[float, ...]) -> bool:
    return all(math.isclose(a, b, abs_tol=_CLOSE) for a, b in zip(found, expected, strict=True))
