"""Frozen layers of a host's network: none of their weights is copied, and none is kept twice for the backward pass.

A host keeps weights in the format of their file (half precision, 8-bit floats) and converts them whenever a layer runs.
So does `lcm_core.networks.frozen`, which lets the weights stay as they are, and even in main memory beside an
accelerator.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lcm_core.networks.frozen import layers_of, run_frozen

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def copy_sharing_weights(network: nn.Module) -> nn.Module:
    """A copy of a network whose linear layers and convolutions have the weights of the original; all else is copied.

    To be called outside of inference mode: what a host loaded in it can then be a part of what is trained.
    """
    shared = {id(weight): _ordinary(weight) for layer in layers_of(network).values() for weight in layer.parameters()}
    return copy.deepcopy(network, shared)


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
    layer.forward = lambda x: run_frozen(x, layer)
