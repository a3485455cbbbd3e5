"""Frozen layers with small weights: these are converted whenever a layer runs, in the backward pass once more.

Plain autograd would keep each converted weight until the backward pass, so that nothing was saved; so do the layers of
the usual quantisation libraries, which are made for inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional, grad

from lcm_core.errors import InputError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FORMATS = {"int8": 8, "fp8": 8, "nf4": 4}
"""Small formats of frozen weights -> bits of each."""
_FEW = 1 << 14  # weights of a layer that is left as it is: it takes no memory, and inputs and outputs are often such
_PIECE, _ALIGNED = 1 << 29, 512  # bytes
_FP8 = torch.float8_e4m3fn
_MANY = 1 << 24
_AT_ONCE = {"cpu": 1 << 20}
"""Weights of a linear layer that are converted at once, by the kind of device; a GPU needs more to be busy."""
_CONVOLUTIONS: dict[int, tuple[Any, Any]] = {
    3: (functional.conv1d, grad.conv1d_input),
    4: (functional.conv2d, grad.conv2d_input),
    5: (functional.conv3d, grad.conv3d_input),
}


def layers_of(network: nn.Module) -> dict[str, Any]:
    """All linear layers and convolutions, by their paths."""
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, LAYERS)}


def run_frozen(x: Tensor, layer: Any) -> Tensor:
    """What a layer makes of x, (..., in) or (B, C, ...), in the format that autocast asks for, or of x.

    The layer has a `weight` in any format, which gets no gradient, perhaps with a `scale_weight` to multiply it with,
    or `unpacked_weight()`, or a `resting_weight` elsewhere in its place.
    """
    return _Frozen.apply(x, layer)


def quantise(network: nn.Module, kind: str, device: torch.device) -> None:
    """Store the weights of a network's larger layers in a small format, one after the other, on a device.

    int8 and fp8 (e4m3) have one scale for each output; nf4 has one for 64 weights (arXiv 2305.14314 Sec. 3) and is
    bitsandbytes'. The layers stay what they are but for their weight, which is no parameter any more.

    Args:
        network: loaded, perhaps elsewhere; what is not quantised is moved to the device too.
        kind: one of `FORMATS`.
        device: where it is to run.

    Raises:
        InputError: an unknown format, or bitsandbytes is not installed.
    """
    check_format(kind)
    for layer in large_layers(network):
        _store(layer, layer._parameters.pop("weight").detach(), kind, device)
        layer.forward = _forward_of(layer)
    network.to(device)


def offload(network: nn.Module, device: torch.device) -> None:
    """Let the weights of a network's larger layers rest in main memory, and move all else to a device. A weight is
    copied there when its layer runs, and once more in the backward pass; what is trained beside it never moves.

    Args:
        network: loaded into main memory, perhaps quantised there in int8 or fp8.
        device: where it is to run.
    """
    memory = _MainMemory(pinned=device.type == "cuda")
    for layer in large_layers(network):
        weight = layer._parameters.pop("weight", layer.weight).detach()
        layer.resting_weight = memory.keep(weight)
        # for code that asks for its shape, its format, and where the layer runs
        layer.weight = torch.zeros(1, dtype=weight.dtype, device=device).expand(weight.shape)
        if hasattr(layer, "scale_weight"):
            layer.scale_weight = layer.scale_weight.to(device)
        layer.forward = _forward_of(layer)
    network.to(device)


def large_layers(network: nn.Module) -> list[Any]:
    """The layers whose weights take nearly all of a network's memory. Only torch's own classes: a subclass may compute
    something else."""
    return [layer for layer in layers_of(network).values() if type(layer) in LAYERS and layer.weight.numel() >= _FEW]


def check_format(kind: str) -> None:
    """Refuse a format that is not known or not here.

    Raises:
        InputError: says what there is, or what is missing.
    """
    if kind not in FORMATS:
        raise InputError(f"unknown format of frozen weights {kind!r}; choose {', '.join(FORMATS)}")
    if kind == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise InputError("nf4 needs bitsandbytes; install it, or choose int8 or fp8") from error


def _forward_of(layer: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: run_frozen(x, layer)


def _store(layer: Any, weight: Tensor, kind: str, device: torch.device) -> None:
    if kind == "nf4":
        from bitsandbytes import functional as bnb

        weight = weight.to(device, torch.float32)
        packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        layer.weight = torch.zeros(1, device=weight.device).expand(weight.shape)  # for code that asks for its shape
        layer.unpacked_weight = lambda: bnb.dequantize_4bit(packed, state)
        return
    dtype, most = (torch.int8, 127.0) if kind == "int8" else (_FP8, torch.finfo(_FP8).max)
    layer.weight = torch.empty(weight.shape, dtype=dtype, device=device)
    layer.scale_weight = torch.empty(len(weight), *[1] * (weight.ndim - 1), device=device)
    at_once = max(1, _AT_ONCE.get(device.type, _MANY) // weight[0].numel())
    for rows in (slice(first, first + at_once) for first in range(0, len(weight), at_once)):
        part = weight[rows].to(device, torch.float32)  # not all of the layer, of which there would be three copies
        scale = part.abs().amax(dim=tuple(range(1, part.ndim)), keepdim=True).clamp(min=1e-12) / most
        part = part / scale
        layer.weight[rows] = part.round() if kind == "int8" else part
        layer.scale_weight[rows] = scale


class _MainMemory:
    """Main memory in large pieces, into which tensors are copied one behind the other. A device copies fastest from
    pinned memory, of which torch rounds each piece up to a power of two: tensors of their own would take up to twice
    their size.

    Args:
        pinned: whether a CUDA device copies from it.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned, self._free = pinned, torch.empty(0, dtype=torch.uint8)

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy."""
        size = -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        if len(self._free) < size:
            self._free = torch.empty(max(size, _PIECE), dtype=torch.uint8, pin_memory=self.pinned)
        place, self._free = self._free[: tensor.nbytes], self._free[size:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class _Frozen(torch.autograd.Function):
    """A layer whose weight gets no gradient and is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if layer.bias is None else layer.bias.to(x.device, x.dtype)
        if isinstance(layer, nn.Linear):
            return _linear(x, layer, bias)
        weight = _converted(layer, x)
        run, _ = _CONVOLUTIONS[weight.ndim]
        result: Tensor = run(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layer, [gradient] = ctx.layer, grads
        if isinstance(layer, nn.Linear):
            return _linear_backward(gradient, layer).to(ctx.dtype), None
        weight = _converted(layer, gradient)
        _, invert = _CONVOLUTIONS[weight.ndim]
        options = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return invert(ctx.shape, weight, gradient, *options).to(ctx.dtype), None


def _linear(x: Tensor, layer: Any, bias: Tensor | None) -> Tensor:
    """x W^T + b, some rows of W at a time, so that a large layer is never converted as a whole."""
    blocks = _row_blocks(layer, x)
    if len(blocks) == 1:
        return functional.linear(x, _converted(layer, x), bias)
    result = x.new_empty(*x.shape[:-1], layer.out_features)
    for rows in blocks:
        part = None if bias is None else bias[rows]
        result[..., rows] = functional.linear(x, _converted(layer, x, rows), part)
    return result


def _linear_backward(gradient: Tensor, layer: Any) -> Tensor:
    """g W, likewise; sums of several parts in float32."""
    blocks = _row_blocks(layer, gradient)
    if len(blocks) == 1:
        return gradient @ _converted(layer, gradient)
    total = gradient.new_zeros(*gradient.shape[:-1], layer.in_features, dtype=torch.float32)
    for rows in blocks:
        total += gradient[..., rows] @ _converted(layer, gradient, rows)
    return total


def _row_blocks(layer: Any, x: Tensor) -> list[slice]:
    if hasattr(layer, "unpacked_weight") or (layer.weight.dtype, layer.weight.device) == (x.dtype, x.device):
        return [slice(None)]
    at_once = max(1, _AT_ONCE.get(x.device.type, _MANY) // layer.in_features)
    return [slice(first, first + at_once) for first in range(0, layer.out_features, at_once)]


def _converted(layer: Any, x: Tensor, rows: slice = slice(None)) -> Tensor:
    """The weight, or some rows of it, on the device and in the format of x; scaled, where there is a scale."""
    unpack = getattr(layer, "unpacked_weight", None)
    if unpack is not None:
        return unpack().to(x.dtype)
    stored: Tensor = getattr(layer, "resting_weight", layer.weight)[rows]
    # converted on the device of x: fewer bytes are copied, and a GPU converts faster
    weight = stored.to(x.device, non_blocking=True).to(x.dtype)
    scale = getattr(layer, "scale_weight", None)
    if scale is None:
        return weight
    scale = (scale[rows] if scale.numel() > 1 else scale).to(x.device, x.dtype)
    return weight * scale if weight is stored else weight.mul_(scale)
