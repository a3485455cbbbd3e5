"""Guidance: classifier-free with a second pass, or as a number that a distilled network was trained to read.

Users give `guidance_scale` (1 = off). Papers and networks use w = guidance_scale - 1; this file alone converts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lcm_core.errors import InputError

Model = Callable[..., Tensor]


def guidance_embedding(w: Tensor, embedding_dim: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sinusoid of 1000 w, (B,) -> (B, embedding_dim): sines, then cosines, then a zero if the width is odd.

    Goes through `time_embedding.cond_proj` of a latent consistency U-Net (arXiv 2310.04378 Sec. 4.2). The order of
    operations is that of diffusers' get_guidance_scale_embedding: the phases reach thousands of radians, so another
    order would round to another embedding than the one in training.
    """
    half = embedding_dim // 2
    rate = torch.exp(torch.arange(half, dtype=dtype, device=w.device) * -(math.log(10000.0) / (half - 1)))
    phase = (w * 1000.0).to(dtype)[:, None] * rate[None, :]  # (B, half)
    embedding = torch.cat([phase.sin(), phase.cos()], dim=1)
    return functional.pad(embedding, (0, 1)) if embedding_dim % 2 else embedding


def guidance_bias(guidance_scale: float, cond_proj: Tensor, linear_1: Tensor) -> Tensor:
    """What one fixed guidance adds to the bias of `time_embedding.linear_1`, for programs that know no `cond_proj`.

    The network computes `linear_1(t_emb + cond_proj(w_emb))`; `linear_1` being linear, the second term is a constant.

    Args:
        guidance_scale: 1 is off.
        cond_proj: weight of `time_embedding.cond_proj`, (C, D).
        linear_1: weight of `time_embedding.linear_1`, (E, C).

    Returns:
        (E,) float32.
    """
    embedding = guidance_embedding(torch.tensor([guidance_scale - 1.0]), cond_proj.shape[1]).to(cond_proj.device)
    return linear_1.float() @ (cond_proj.float() @ embedding[0])


def guide(
    model: Model,
    cond: dict[str, Any],
    uncond: dict[str, Any] | None,
    guidance_scale: float | Tensor = 1.0,
    guidance_embedding_dim: int | None = None,
) -> Model:
    """Wrap `model(x, sigma, **extra_args)` into a guided `model(x, sigma)`.

    With `guidance_embedding_dim` the network itself was distilled with guidance: w enters as `timestep_cond` and there
    is no negative pass. Without it: eps~ = (1 + w) eps_cond - w eps_uncond (arXiv 2207.12598 Eq. 6), which holds for x0
    alike, in one batch of twice the size; at scale 1, or without `uncond`, only the positive pass runs.

    Args:
        cond, uncond: what the network is given, tensors with the batch first (B, ...); dicts inside are followed.
        guidance_scale: one number, or a tensor (B,) with one for each image (which always takes both passes).
        guidance_embedding_dim: the network's `time_cond_proj_dim`, or None for a network without one.

    Raises:
        InputError: cond and uncond differ in their keys, or in a shape behind the batch.
    """
    if guidance_embedding_dim is not None:
        return _embedded(model, cond, guidance_scale, guidance_embedding_dim)
    if uncond is None or (not isinstance(guidance_scale, Tensor) and guidance_scale == 1):
        return _positive(model, cond)
    return _classifier_free(model, _join(cond, uncond), guidance_scale)


def _positive(model: Model, cond: dict[str, Any]) -> Model:
    def guided(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        return model(x, sigma, **cond, **extra_args)

    return guided


def _embedded(model: Model, cond: dict[str, Any], guidance_scale: float | Tensor, embedding_dim: int) -> Model:
    w = torch.as_tensor(guidance_scale, dtype=torch.float32).to(_device(cond)).reshape(-1) - 1
    embedding = guidance_embedding(w, embedding_dim)  # (1 or B, embedding_dim)

    def guided(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        each = embedding if len(embedding) == len(x) else embedding.expand(len(x), -1)
        return model(x, sigma, timestep_cond=each, **cond, **extra_args)

    return guided


def _classifier_free(model: Model, both: dict[str, Any], guidance_scale: float | Tensor) -> Model:
    if isinstance(guidance_scale, Tensor):
        guidance_scale = guidance_scale.to(_device(both))

    def guided(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        scale = guidance_scale
        if isinstance(scale, Tensor):
            scale = scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))  # (B, 1, 1, 1)
        doubled = torch.cat([x, x]), torch.cat([sigma, sigma])
        positive, negative = model(*doubled, **both, **_join(extra_args, extra_args)).chunk(2)
        return torch.lerp(negative, positive, scale)

    return guided


def _device(cond: dict[str, Any]) -> torch.device | None:
    # Moved there once: a copy inside every step would wait for the device.
    return next((value.device for value in cond.values() if isinstance(value, Tensor)), None)


def _join(cond: dict[str, Any], uncond: dict[str, Any]) -> dict[str, Any]:
    """Positive and negative in one batch, (2B, ...), made once and not in every step."""
    if cond.keys() != uncond.keys():
        raise InputError(f"cond has {sorted(cond)} but uncond has {sorted(uncond)}; give both the same entries")
    joined: dict[str, Any] = {}
    for key, value in cond.items():
        other = uncond[key]
        if isinstance(value, dict):
            joined[key] = _join(value, other)
        elif isinstance(value, Tensor):
            if value.shape[1:] != other.shape[1:]:
                raise InputError(
                    f"{key} is {tuple(value.shape)} in cond but {tuple(other.shape)} in uncond; pad them alike"
                )
            joined[key] = torch.cat([value, other])
        else:
            joined[key] = value
    return joined
