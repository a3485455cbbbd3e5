"""Flow maps: networks with a second time input, which are told where on the trajectory a jump is to end.

A network that only sees x_t must answer alike whether it is asked for one jump or for the first of eight, and settles
between them. One that knows the end can answer each (CTM, arXiv 2310.02279; flow map matching, arXiv 2406.07507).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lcm_core.diffusion.guidance import Model, guidance_embedding
from lcm_core.diffusion.process import Process, stable_diffusion
from lcm_core.errors import InputError

EMBEDDING_DIM = 256
"""Width of the end's embedding."""
END_KEY = "end_embedding_dim"
"""In a U-Net's configuration: how many of `time_cond_proj_dim` are the end's embedding, the last ones."""


def end_embedding(end: Tensor, embedding_dim: int = EMBEDDING_DIM) -> Tensor:
    """Sinusoid of a jump's end, (B,) -> (B, embedding_dim).

    Args:
        end: timesteps as a share of all training timesteps, so that the sinusoids are those of timesteps 0 to 1000.
        embedding_dim: the width.
    """
    return guidance_embedding(end, embedding_dim)


def told_ends(model: Model, sigmas: Tensor, gamma: float = 0.0, process: Process | None = None) -> Model:
    """Tell a model in each step of `sample_tcd` where that step's jump ends.

    Args:
        model: `model(x, sigma, end=...)`, with the end (B,) as a share of all training timesteps.
        sigmas: (N + 1,), falling: those that the sampler is given, by which a step is known.
        gamma: the sampler's.
        process: the model's; None is Stable Diffusion's.

    Returns:
        `model(x, sigma)`.
    """
    process = process or stable_diffusion()
    levels = sigmas[:-1].float()
    landings = process.sigma_to_t(process.landing(sigmas.cpu()[1:], gamma)) / process.num_train_timesteps
    ends = landings.float().to(sigmas.device)

    def told(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        reached = (levels >= sigma.max() * (1 - 1e-6)).sum().clamp(min=1)
        return model(x, sigma, end=ends[reached - 1].expand(len(x)), **extra_args)

    return told


def check_sampler(sampler: str) -> None:
    """Refuse a sampler whose steps are no jumps with an end.

    Raises:
        InputError: names it.
    """
    if sampler != "tcd":
        raise InputError(f"sampler {sampler} does not tell this model where a step ends; use tcd, with gamma 0")
