"""Which device, number format and memory layout suit this machine, and how a network is filled with its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import Component, check_finite

Network = TypeVar("Network", bound=nn.Module)
Device = str | torch.device
LARGE_ON_CPU = 50_000_000
"""With fewer weights, converting to bfloat16 costs a U-Net more than it saves: 34 ms instead of 23 for 9 million."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def choose_device(device: Device | None = None) -> torch.device:
    """The given device, or the fastest one here: CUDA (or ROCm), Apple's, else the CPU.

    Raises:
        InputError: the device is not known or not here.
    """
    if device is None:
        return torch.device(_fastest_device())
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{device}' is not available here; use 'cpu' or '{_fastest_device()}'") from error
    return chosen


def choose_dtype(device: Device, dtype: str | torch.dtype | None = None, parameters: int = LARGE_ON_CPU) -> torch.dtype:
    """The given number format, or the fastest one that is safe.

    That is bfloat16 where the hardware has it, else float16 on CUDA, else float32.

    Args:
        device: where the network will run.
        dtype: "float32", "bfloat16", "float16", their short forms ("fp32", "bf16", "fp16"), or a torch.dtype.
        parameters: how many weights a U-Net has; a small one is faster in float32 on a CPU.

    Raises:
        InputError: the format is not known.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if (name := _SHORT.get(dtype, dtype)) not in _DTYPES:
            raise InputError(f"unknown dtype '{dtype}'; use one of {', '.join(_DTYPES)}")
        return _DTYPES[name]
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    is_large = parameters >= LARGE_ON_CPU
    return torch.bfloat16 if kind == "cpu" and is_large and _cpu_has_bfloat16() else torch.float32


def choose_memory_format(device: Device, memory_format: torch.memory_format | None = None) -> torch.memory_format:
    """The given layout, or the one in which convolutions are fastest: channels last, but not on Apple's GPUs."""
    if memory_format is not None:
        return memory_format
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def assemble(
    build: Callable[[], Network],
    component: Component,
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Network:
    """Build a network without initialising it and give it a component's weights; frozen, and in evaluation mode.

    Raises:
        InputError: a weight is missing, left over, of another shape, or not finite.
    """
    check_finite(component.tensors, component.source)
    with torch.device("meta"):
        network = build()
    expected, given = network.state_dict(), component.tensors
    for what, keys in (("lacks", expected.keys() - given.keys()), ("has too many", given.keys() - expected.keys())):
        if keys:
            raise InputError(
                f"{component.source} {what} {len(keys)} weights for its configuration (first: '{min(keys)}'); "
                "get the model again"
            )
    for key, tensor in given.items():
        if tensor.shape != expected[key].shape:
            raise InputError(
                f"{component.source}: weight '{key}' has shape {tuple(tensor.shape)}, its configuration says "
                f"{tuple(expected[key].shape)}; get the model again"
            )
    ready = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in given.items()}
    network.load_state_dict(ready, assign=True)
    return network.to(memory_format=memory_format).eval().requires_grad_(False)  # type: ignore[call-overload]


def _fastest_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@functools.cache
def _cpu_has_bfloat16() -> bool:
    """Without the instructions bfloat16 is emulated, and slower than float32. torch 2.1 cannot tell, Linux can."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
