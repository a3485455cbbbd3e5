"""Number format and memory layout of the recipe's training, as the machine at hand has them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from lcm_core.networks.device import LARGE_ON_CPU
from trainer.students import choose_precision

Module = TypeVar("Module", bound=nn.Module)


def precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor or the GPU has it, else float32: emulated, bfloat16 is many times slower."""
    return choose_precision(device, "auto", LARGE_ON_CPU)


def autocast(device: torch.device) -> torch.autocast:
    """Compute in this machine's `precision`; weights, their moments and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)


def place(network: Module, device: torch.device) -> Module:
    """The network on its device, with the layout that trains fastest there.

    On a CPU that is the plain one: convolutions gain little from channels last, and the backward pass of group
    normalisation takes eight times as long.
    """
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return network.to(device, memory_format=layout)  # type: ignore[call-overload]
