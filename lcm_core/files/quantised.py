"""Weights stored in 8 bits: each output channel as whole numbers from -127 to 127 and one scale.

A folder's file, called `...int8.safetensors`, then holds `<layer>.weight` in int8 and `<layer>.weight_scale`, as in
ComfyUI. They are made plain weights when they are read; everything behind that sees the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lcm_core.errors import InputError

SCALE = "_scale"
"""What the name of a weight's scale ends with."""
_LARGEST = 127
_SCALES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SMALL = 2**14
"""Numbers in a weight below which it stays as it is: nothing is saved, and first and last layers are among these."""


def quantise(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with every large matrix and convolution (O, ...) as int8, and a float16 scale (O,) beside it.

    The error of a weight is at most half its channel's scale, a 254th of the channel's largest weight.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or tensor.numel() < _SMALL or not name.endswith(".weight"):
            stored[name] = tensor
            continue
        scale = _half_scale(tensor.float().flatten(1).abs().amax(1) / _LARGEST)
        stored[name] = (tensor.float() / _as_column(scale.float(), tensor)).round().to(torch.int8)
        stored[name + SCALE] = scale
    return stored


def dequantise(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The same tensors, with those that have a scale as plain weights in the scale's format.

    Args:
        source: named in errors.

    Raises:
        InputError: a scale that belongs to no 8-bit weight, or is not one number for each of its channels.
    """
    plain = {name: tensor for name, tensor in tensors.items() if not _is_scale(name)}
    for name, scale in tensors.items():
        if _is_scale(name):
            weight = plain.get(name.removesuffix(SCALE))
            fits = weight is not None and weight.dtype == torch.int8 and scale.shape == weight.shape[:1]
            if weight is None or not fits or scale.dtype not in _SCALES:
                raise InputError(f"{source} has '{name}', which fits no 8-bit weight of it; get the file again")
            plain[name.removesuffix(SCALE)] = weight.to(scale.dtype) * _as_column(scale, weight)
    return plain


def _is_scale(name: str) -> bool:
    return name.endswith(".weight" + SCALE)


def _half_scale(scale: Tensor) -> Tensor:
    """The next float16 at or above, so that no weight lies outside; 1 for a channel of zeros."""
    half = scale.half()
    above = (half.view(torch.int16) + 1).view(torch.float16)  # positive floats are ordered as their bits are
    return torch.where(scale > 0, torch.where(half.float() < scale, above, half), 1.0)


def _as_column(scale: Tensor, weight: Tensor) -> Tensor:
    """(O,) -> (O, 1, ...), to go with a weight (O, ...)."""
    return scale.view(-1, *[1] * (weight.ndim - 1))
