"""Frozen layers of a host's network: none of their weights is copied, and none is kept twice for the backward pass.

A host keeps weights in the format of their file (half precision, 8-bit floats) and converts them whenever a layer runs.
Plain autograd would keep each converted weight until the backward pass. Here a layer converts its weight once more
there instead, so that the weights may stay as they are, and even in main memory beside an accelerator.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional, grad

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CONVOLUTIONS: dict[int, tuple[Any, Any]] = {
    3: (functional.conv1d, grad.conv1d_input),
    4: (functional.conv2d, grad.conv2d_input),
    5: (functional.conv3d, grad.conv3d_input),
}


def copy_sharing_weights(network: nn.Module) -> nn.Module:
    """A copy of a network whose linear layers and convolutions have the weights of the original; all else is copied.

    To be called outside of inference mode: what a host loaded in it can then be a part of what is trained.
    """
    shared = {id(weight): _ordinary(weight) for layer in layers_of(network).values() for weight in layer.parameters()}
    return copy.deepcopy(network, shared)


def layers_of(network: nn.Module) -> dict[str, Any]:
    """All linear layers and convolutions, by their paths."""
    return {path: layer for path, layer in network.named_modules() if isinstance(layer, LAYERS)}


def freeze(network: nn.Module, device: torch.device, dtype: torch.dtype, resident: bool = True) -> None:
    """Prepare a copied network for training: all of it is frozen, and runs on `device` in `dtype`.

    Args:
        network: from `copy_sharing_weights`.
        device: where it is to run.
        dtype: of the computation.
        resident: move the weights to the device; else each follows its layer's input, and is gone after it.
    """
    network.requires_grad_(False)
    for layer in layers_of(network).values():
        if type(layer.weight) in (Tensor, nn.Parameter):  # others only their host can convert
            _freeze_layer(layer, device, dtype, resident)
        else:
            layer.comfy_cast_weights = True
    network.to(device, dtype)  # what is left: norms and embeddings


def weights_of(network: nn.Module) -> list[Tensor]:
    """All weights of a network, whether or not they are frozen."""
    frozen = [weight for layer in layers_of(network).values() for weight in (layer.weight, layer.bias)]
    found = [*network.parameters(), *(weight for weight in frozen if weight is not None)]
    return list({id(weight): weight for weight in found}.values())


def _ordinary(weight: Tensor) -> nn.Parameter:
    """The same numbers in the same place as a parameter that may be used in training, even if it came to be in
    inference mode."""
    if type(weight.data) is not Tensor:
        return nn.Parameter(weight.data, requires_grad=False)
    plain = torch.empty(0, dtype=weight.dtype, device=weight.device)
    plain.set_(weight.untyped_storage(), weight.storage_offset(), weight.shape, weight.stride())
    return nn.Parameter(plain, requires_grad=False)


def _freeze_layer(layer: Any, device: torch.device, dtype: torch.dtype, resident: bool) -> None:
    for name in ("weight", "bias"):
        tensor = layer._parameters.pop(name)
        if tensor is not None and resident:
            # 8-bit floats stay small; others are converted once
            tensor = tensor.detach().to(device, dtype if tensor.dtype in _FLOATS else None)
        # no parameter any more, so that moving the network leaves it where it is
        object.__setattr__(layer, name, None if tensor is None else tensor.detach())
    layer.forward = lambda x: _Frozen.apply(x, layer)


class _Frozen(torch.autograd.Function):
    """A layer whose weight gets no gradient and is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        weight = _converted(layer, x)
        bias = None if layer.bias is None else layer.bias.to(x.device, x.dtype)
        if isinstance(layer, nn.Linear):
            return functional.linear(x, weight, bias)
        run, _ = _CONVOLUTIONS[weight.ndim]
        result: Tensor = run(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layer, [gradient] = ctx.layer, grads
        weight = _converted(layer, gradient)
        if isinstance(layer, nn.Linear):
            return gradient @ weight, None
        _, invert = _CONVOLUTIONS[weight.ndim]
        return invert(ctx.shape, weight, gradient, layer.stride, layer.padding, layer.dilation, layer.groups), None


def _converted(layer: Any, x: Tensor) -> Tensor:
    """The weight on the device and in the format of x; scaled, where a host keeps 8-bit floats with a scale."""
    weight: Tensor = layer.weight.to(x.device, x.dtype, non_blocking=True)
    scale = getattr(layer, "scale_weight", None)
    return weight if scale is None else weight * scale.to(x.device, x.dtype)
