"""Layers and attention on the matrix kernels of oneDNN, torch's library for CPUs, in the form that they run fastest.

Weights are packed once in the order that the kernels read. Otherwise oneDNN does that anew in every call, which for a
convolution with 2560 channels on 8 x 8 pixels takes three times as long as the convolution itself.

Operators are called by their overload's name. Left to find it, torch composes a message, tensors printed and all, for
each overload that does not fit: milliseconds.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CACHE_BYTES = 2**20
"""Attention weights that a thread makes before it uses them, so that they are still in its cache."""
_LOST = 1e-30  # a row of attention weights with a smaller sum was too small for the number format
_ROWS = 64  # asked for when packing a linear layer, of no influence on the result


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor has the kernels for a number format."""
    if not torch.backends.mkldnn.is_available():
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    return dtype in {"AVX2": [torch.float32], "AVX512": [torch.float32, torch.bfloat16]}.get(capability, [])


class PackedLinear(nn.Module):
    """A linear layer; what follows it, an activation or a sum or product with another tensor, is part of it."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: (out, in), or (out, in, 1, 1) of a convolution."""
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().flatten(1), _ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor, other: Tensor | None = None, operation: str = "none") -> Tensor:
        """(..., in) to (..., out). `operation`: "none", "gelu", "sigmoid"; with `other` (..., out), "add" or "mul"."""
        if other is None:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, operation, [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, operation)


class PackedConv2d(nn.Module):
    """A convolution in channels-last memory; a sum with another tensor is part of it.

    Which order of the weights the kernels read depends on the picture's size and on the threads, so they are packed
    when the first picture comes, and again when these change. In another order they would be packed in every call.
    """

    def __init__(self, conv: nn.Conv2d, weight: Tensor | None = None) -> None:
        """weight: (out, in, h, w), to be used in place of `conv`'s, without padding."""
        super().__init__()
        padding = list(conv.padding) if weight is None else [0, 0]
        self.geometry = (padding, list(conv.stride), list(conv.dilation), conv.groups)
        self.weight = conv.weight.detach() if weight is None else weight
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.packed_for: tuple[int, ...] = ()

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """(B, in, H, W) to (B, out, H', W'), plus `other` of that shape."""
        x = x.contiguous(memory_format=torch.channels_last)
        if (place := (*x.shape[1:], torch.get_num_threads())) != self.packed_for:
            self._pack(x.shape[1:])
            self.packed_for = place
        parts = (self.weight, self.bias, *self.geometry)
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise.default(x, *parts, "none", [], "none")
        other = other.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, other, *parts, "add", 1.0, None, [], None)

    def _pack(self, size: torch.Size) -> None:
        """Order the weights for pictures (in, H, W)."""
        plain = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(plain, *self.geometry, [1, *size])


class FoldedUpsample(nn.Module):
    """Doubling by nearest neighbours, then a 3x3 convolution: four 2x2 convolutions of the picture before doubling.

    Of the nine doubled pixels under the kernel, those that are copies of one another share a product with the sum of
    their weights; which ones, depends on whether the output's row and column are even or odd. 4/9 of the products
    remain.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        self.phases = nn.ModuleList(
            PackedConv2d(conv, _phase_weight(self.weight, row, column)) for row in (0, 1) for column in (0, 1)
        )

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """(B, in, H, W) to (B, out, 2H, 2W), or to the `output_size` that a picture with odd sides needs."""
        if output_size is not None:
            return functional.conv2d(functional.interpolate(x, size=output_size), self.weight, self.bias, padding=1)
        batch, _, height, width = x.shape
        padded = functional.pad(x, (1, 1, 1, 1))
        out = x.new_empty(batch, 2 * height, 2 * width, len(self.weight)).permute(0, 3, 1, 2)  # channels last
        for number, phase in enumerate(self.phases):
            row, column = divmod(number, 2)
            out[:, :, row::2, column::2] = phase(padded[:, :, row : row + height + 1, column : column + width + 1])
        return out


def _phase_weight(weight: Tensor, row: int, column: int) -> Tensor:
    """The kernel (out, in, 2, 2) of the outputs with even (0) or odd (1) row and column."""
    folded = weight.float()
    for axis, phase in ((2, row), (3, column)):
        first, middle, last = folded.split(1, axis)
        folded = torch.cat([first + middle, last] if phase else [first, middle + last], axis)
    return folded.to(weight.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v` for many tokens, in two matrix products per head.

    Softmax stays the same when all scores of a row move alike. Moved so that none is above -margin, their exponential
    is their sigmoid, but for a part in exp(margin), and that the first product can evaluate itself, in float32 and
    before rounding. The move is the bound |q_i| max_j |k_j| on the scores (Cauchy-Schwarz), made narrow by taking the
    keys' mean from the keys, which moves rows too. The sums that softmax divides by are columns of the second product:
    several, each rounded on its own, in place of the zeros that would fill it up to a multiple of 16.

    Args:
        q, k, v: (B, H, N, D), of any strides.

    Returns:
        (B, H, N, D). Heads whose bound is so wide that weights are lost are computed by torch's own kernel.
    """
    dim, tokens = v.shape[-1], v.shape[-2]
    queries, keys = _scores_below_zero(q, k)
    columns = 16 - dim % 16
    ones = torch.eye(columns, dtype=v.dtype).repeat(1, -(-tokens // columns))[:, :tokens]
    values = torch.cat([v.transpose(-1, -2), ones.expand(*v.shape[:2], columns, tokens)], dim=-2)
    rows = torch.get_num_threads() * max(CACHE_BYTES // (tokens * q.element_size()), 64)
    heads = zip(queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), strict=True)
    mixed = torch.stack([_mix(*head, rows) for head in heads]).unflatten(0, q.shape[:2])  # (B, H, N, D + columns)
    sums = mixed[..., dim:].sum(-1, keepdim=True, dtype=torch.float32)
    output = (mixed[..., :dim] / sums).to(q.dtype)
    lost = ~(sums > _LOST).flatten(2).all(-1)  # (B, H)
    if bool(lost.any()):
        output[lost] = functional.scaled_dot_product_attention(q[lost], k[lost], v[lost])
    return output


def _mix(queries: Tensor, keys: Tensor, values: Tensor, rows: int) -> Tensor:
    """`sigmoid(queries keys^T) values^T` for one head, so many rows at a time: (N, E), (N, E), (F, N) to (N, F)."""
    scores, mix = PackedLinear(keys), PackedLinear(values)
    return torch.cat([mix(scores(some, operation="sigmoid")) for some in queries.split(rows)])


def _scores_below_zero(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, N, D + 2) whose products are the scores, each row moved to lie below -margin.

    The move rides along as two more channels; two, since bfloat16 is multiplied in pairs.
    """
    scale = q.shape[-1] ** -0.5
    power = 2.0 ** math.floor(math.log2(scale))  # the queries' share of the scale rounds nothing off
    keys = k.float()
    keys = (keys - keys.mean(-2, keepdim=True)) * (scale / power)
    longest = torch.linalg.vector_norm(keys, dim=-1).amax(-1)[..., None, None]  # (B, H, 1, 1)
    margin = -math.log(torch.finfo(q.dtype).eps / 16)
    bound = torch.linalg.vector_norm(q, dim=-1, keepdim=True, dtype=torch.float32) * (power * longest) + margin
    halves = (-bound / 2).to(q.dtype).expand(*q.shape[:-1], 2)
    return torch.cat([q * power, halves], dim=-1), torch.cat([keys.to(k.dtype), halves.new_ones(*k.shape[:-1], 2)], -1)
