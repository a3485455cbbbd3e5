"""Travelling between noises, image latents and prompt embeddings: lerp, slerp, easing, keyframes, closed loops.

A *frame* is a pair of keyframes and a fraction between them. Everything that makes a picture (prompt embedding, first
noise, the re-noise of each later step, image latents) is mixed by that one fraction, and a fraction of 0 or 1 returns
the keyframe itself, bit for bit; so a frame on a keyframe is the picture that the keyframe makes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lcm_core.errors import InputError

NoiseSampler = Callable[..., Tensor]
"""`noise_sampler(sigma, sigma_next) -> noise`, as in k-diffusion."""

_PARALLEL = 1e-4  # radians; below it (or as near to pi) sin(angle) is too small to divide by

_EASINGS: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "smooth": lambda t: t * t * (3 - 2 * t),
    "sine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    "cubic": lambda t: 4 * t**3 if t < 0.5 else 1 - 4 * (1 - t) ** 3,
    "in": lambda t: t * t,
    "out": lambda t: t * (2 - t),
}
EASINGS = tuple(_EASINGS)
MODES = ("slerp", "lerp")


class Frame(NamedTuple):
    """Where a frame lies: `fraction` of the way from keyframe `start` to keyframe `end`."""

    start: int
    end: int
    fraction: float


def lerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """Straight line from `a` (t = 0) to `b` (t = 1), both (B, ...); `t` is a number or (B,). Ends are bit-exact.

    >>> lerp(torch.zeros(1, 2), torch.ones(1, 2), 0.25)
    tensor([[0.2500, 0.2500]])
    """
    t = _per_sample(t, a)
    return _exact_ends(torch.lerp(_wide(a), _wide(b), t), a, b, t)


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """Arc from `a` (t = 0) to `b` (t = 1), both (B, ...), each sample one vector; `t` is a number or (B,).

    (sin((1-t) o) a + sin(t o) b) / sin(o), with o the angle between a and b (Shoemake 1985, "Animating rotation with
    quaternion curves"). Mixed Gaussian noise keeps the variance 1 that the model expects; midway, a line halves it.
    Samples that are nearly parallel or opposite, or zero, take the straight line. Ends are bit-exact.
    """
    t = _per_sample(t, a)
    wide_a, wide_b = _wide(a), _wide(b)
    angle = _angle(wide_a, wide_b)
    straight = ~((angle > _PARALLEL) & (angle < math.pi - _PARALLEL))  # true of NaN too: a zero vector has no angle
    sine = torch.where(straight, 1.0, torch.sin(angle))
    arc = torch.sin((1 - t) * angle) / sine * wide_a + torch.sin(t * angle) / sine * wide_b
    return _exact_ends(torch.where(straight, torch.lerp(wide_a, wide_b, t), arc), a, b, t)


def interpolate(a: Tensor, b: Tensor, t: float | Tensor, mode: str = "slerp") -> Tensor:
    """`slerp` or `lerp`, by name.

    Raises:
        InputError: another name.
    """
    if mode not in MODES:
        raise InputError(f"unknown interpolation mode {mode!r}; choose one of {', '.join(MODES)}")
    return slerp(a, b, t) if mode == "slerp" else lerp(a, b, t)


def ease(t: float, kind: str = "linear") -> float:
    """Bend time: `t` in [0, 1] to [0, 1], with 0 and 1 kept. Kinds: linear, smooth, sine, cubic, in, out.

    Raises:
        InputError: another kind.
    """
    if kind not in _EASINGS:
        raise InputError(f"unknown easing {kind!r}; choose one of {', '.join(EASINGS)}")
    return _EASINGS[kind](t)


def plan_frames(keyframes: int, frames: int, easing: str = "linear", loop: bool = False) -> list[Frame]:
    """Spread `frames` evenly over `keyframes`, with `easing` between each two.

    Open: the first frame is the first keyframe and the last frame is the last one. Closed (`loop`): the way goes on
    from the last keyframe back to the first, and stops one frame before it, so that the animation repeats seamlessly.

    Raises:
        InputError: no keyframe, no frame, or an unknown easing.
    """
    if keyframes < 1:
        raise InputError("no keyframes were given; give at least one")
    if frames < 1:
        raise InputError(f"cannot make {frames} frames; ask for 1 or more")
    segments, length = (keyframes, frames) if loop else (keyframes - 1, max(frames - 1, 1))
    plan = []
    for index in range(frames):
        start, rest = divmod(index * segments, length)  # integers: a frame meant to lie on a keyframe does so exactly
        start %= keyframes
        end = (start + 1) % keyframes if rest else start
        plan.append(Frame(start, end, ease(rest / length, easing)))
    return plan


def travel(keyframes: Tensor, frames: int, mode: str = "slerp", easing: str = "linear", loop: bool = False) -> Tensor:
    """Keyframes (K, ...) to frames (F, ...), spread as `plan_frames` says."""
    plan = plan_frames(len(keyframes), frames, easing, loop)
    fractions = torch.tensor([frame.fraction for frame in plan], dtype=torch.float64)
    starts, ends = keyframes[[frame.start for frame in plan]], keyframes[[frame.end for frame in plan]]
    return interpolate(starts, ends, fractions, mode)


def travel_noise_sampler(a: NoiseSampler, b: NoiseSampler, t: float, mode: str = "slerp") -> NoiseSampler:
    """The re-noise of a frame: at each step the mixture of what keyframes `a` and `b` would draw at that step.

    Without it only the first noise would travel, and every later step would jump from frame to frame.
    """

    def sample(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return interpolate(a(sigma, sigma_next), b(sigma, sigma_next), t, mode)

    return sample


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _per_sample(t: float | Tensor, like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    t = torch.as_tensor(t, dtype=dtype, device=like.device)
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def _exact_ends(mixed: Tensor, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return torch.where(t == 0, a, torch.where(t == 1, b, mixed.to(a.dtype)))


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Angles (B, 1, ...) between samples; 2 atan2(|u-v|, |u+v|) is exact where acos of the product loses its digits."""
    u, v = _unit(a), _unit(b)
    dims = tuple(range(1, a.ndim))
    difference = (u - v).square().sum(dims, keepdim=True).sqrt()
    total = (u + v).square().sum(dims, keepdim=True).sqrt()
    return 2 * torch.atan2(difference, total)


def _unit(x: Tensor) -> Tensor:
    return x / x.square().sum(tuple(range(1, x.ndim)), keepdim=True).sqrt()
