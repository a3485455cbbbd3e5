"""What each kind of adapter adds to a weight: free functions of its factors, in float32, checked by `lora_tensors`.

Results are matrices of (outputs, inputs * kernel), which is a convolution's weight flattened behind its outputs. Scales
by alpha and rank are the caller's. r is the rank; kernel dimensions are absent in linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]
"""Tensors by their role (`lora_keys.Role`)."""


def delta_lora(factors: Factors) -> Tensor:
    """`up @ down` (arXiv 2106.09685 Sec. 4.1); with `mid` the Tucker form `mid x_1 up x_2 down` (arXiv 2309.14859).

    Args:
        factors: down (r, in, kernel), up (out, r); or down (r, in), mid (r, r, kernel), up (out, r).
    """
    up = _matrix(factors["up"])
    if "mid" in factors:
        return _tucker(factors["mid"], up.T, _matrix(factors["down"]))
    return up @ _rows(factors["down"])


def delta_loha(factors: Factors) -> Tensor:
    """`(w1_a @ w1_b) * (w2_a @ w2_b)`, a Hadamard product (arXiv 2108.06098 Prop. 1).

    Args:
        factors: w*_a (out, r), w*_b (r, in * kernel); in Tucker form t* (r, r, kernel), w*_a (r, out), w*_b (r, in).
    """
    return _low_rank(factors, "hada_w1", "hada_t1") * _low_rank(factors, "hada_w2", "hada_t2")


def delta_lokr(factors: Factors) -> Tensor:
    """`kron(w1, w2)` (arXiv 2212.10650, 2309.14859); each of the two whole, or a product as in `delta_loha`."""
    return torch.kron(_low_rank(factors, "lokr_w1"), _low_rank(factors, "lokr_w2", "lokr_t2"))


def decompose(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """What DoRA adds: `magnitude * (W + delta) / ||W + delta|| - W` (arXiv 2402.09353 Eq. 5).

    Args:
        weight: (out, in, kernel).
        delta: of the same shape.
        magnitude: (out, 1, ...) or (out,) with a norm for each output, as in peft and newer LyCORIS (`wd_on_output`);
            (1, in, 1, ...) with a norm for each input.
    """
    merged = weight + delta
    axis = magnitude_axis(magnitude, weight.shape)
    others = [dim for dim in range(merged.ndim) if dim != axis]
    norm = torch.linalg.vector_norm(merged, dim=others, keepdim=True) + torch.finfo(merged.dtype).eps
    return merged * (magnitude.float().reshape(norm.shape) / norm) - weight


def magnitude_axis(magnitude: Tensor, shape: Sequence[int]) -> int:
    """The dimension of a weight of this shape that a DoRA's norms run along: 0 (outputs) or 1 (inputs)."""
    return 0 if len(magnitude) == shape[0] else 1


def _low_rank(factors: Factors, name: str, core: str = "") -> Tensor:
    if name in factors:
        return _rows(factors[name])
    a, b = factors[f"{name}_a"], factors[f"{name}_b"]
    if core in factors:
        return _tucker(factors[core], a.float(), b.float())
    return _matrix(a) @ _rows(b)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Core (r, r, kernel), a (r, out), b (r, in) to (out, in * kernel)."""
    return torch.einsum("ij...,io,jn->on...", core.float(), a, b).flatten(1)


def _matrix(factor: Tensor) -> Tensor:
    """(n, m) from (n, m, 1, 1), as which trainers store it for convolutions."""
    return factor.float().reshape(factor.shape[:2])


def _rows(factor: Tensor) -> Tensor:
    return factor.float().flatten(1)
