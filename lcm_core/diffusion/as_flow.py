"""A variance-preserving network as a rectified flow, by the exact change of variables between the two processes.

x_flow = (1 - s) x0 + s eps is r x_vp with r = sqrt((1 - s)^2 + s^2) at the timestep whose abar is (1 - s)^2 / r^2; so
what the one network says of x0 and eps there, the other says too (as in SANA-Sprint, arXiv 2503.09641 Sec. 3.1, the
other way round).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion, per_sample, to_eps, to_x0
from lcm_core.diffusion.process import VariancePreserving
from lcm_core.errors import InputError


def as_flow(network: Callable[..., Tensor], diffusion: Diffusion) -> Callable[..., Tensor]:
    """`flow(x, s, *args, **kwargs) -> eps - x0` of a network that is called as `network(x_t, t, *args, **kwargs)`.

    x is (B, ...) and s (B,) in [0, 1]. Above the noise that the network's last timestep knows (s = .936 for Stable
    Diffusion's schedule) it is asked at that timestep.

    Args:
        network: takes timesteps (B,), and answers as `diffusion` says.
        diffusion: variance-preserving, of v_prediction or sample: a network that predicts the noise says nothing of x0
            at s = 1.

    Raises:
        InputError: another diffusion.
    """
    process, kind = diffusion.process, diffusion.prediction_type
    if not isinstance(process, VariancePreserving) or kind == "epsilon":
        raise InputError(f"a network of prediction_type {kind!r} cannot be made a flow; use v_prediction or sample")

    def flow(x: Tensor, s: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        level = s.to(wide.dtype)
        t = process.sigma_to_t(level / (1 - level))
        level = per_sample(level, x)
        r = ((1 - level).square() + level.square()).sqrt()
        a, b, x_t = (1 - level) / r, level / r, wide / r
        output = network(x_t.to(x.dtype), t, *args, **kwargs).to(wide.dtype)
        return (to_eps(output, x_t, a, b, kind) - to_x0(output, x_t, a, b, kind)).to(x.dtype)

    return flow
