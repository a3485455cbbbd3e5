"""Which device, number format and memory layout suit this machine, and how a network is filled with its weights."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import Component, check_finite

Module = TypeVar("Module", bound=nn.Module)
Device = str | torch.device
LARGE_ON_CPU = 50_000_000
"""The weights from which bfloat16 pays on a CPU: with fewer, converting to bfloat16 costs a U-Net more than it saves:
34 ms instead of 23 for 9 million."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def choose_device(device: Device | None = None) -> torch.device:
    """The given device, or the fastest one here: CUDA (or ROCm), Intel's XPU, Apple's, else the CPU.

    Raises:
        InputError: the device is not known or not here.
    """
    if device is None:
        return torch.device(_fastest_device())
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
        if chosen.type == "meta":
            raise RuntimeError("it computes nothing")
    except Exception as error:  # of each back end its own
        here = " or ".join(f"'{name}'" for name in dict.fromkeys(("cpu", _fastest_device())))
        raise InputError(f"device '{device}' is not available here; use {here}") from error
    return chosen


def choose_dtype(device: Device, dtype: str | torch.dtype | None = None, parameters: int = LARGE_ON_CPU) -> torch.dtype:
    """The given number format, or the fastest one that is safe.

    That is bfloat16 where the hardware has it (all of Intel's GPUs do), else float16 on CUDA, else float32.

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
        return torch.bfloat16 if _cuda_has_bfloat16() else torch.float16
    if kind == "xpu":
        return torch.bfloat16
    is_large = parameters >= LARGE_ON_CPU
    return torch.bfloat16 if kind == "cpu" and is_large and _cpu_has_bfloat16() else torch.float32


def is_large(network: nn.Module) -> bool:
    """Whether a network has at least `LARGE_ON_CPU` weights."""
    return sum(weight.numel() for weight in network.parameters()) >= LARGE_ON_CPU


def choose_memory_format(device: Device, memory_format: torch.memory_format | None = None) -> torch.memory_format:
    """The given layout, or the one in which convolutions are fastest: channels last, but not on Apple's GPUs."""
    if memory_format is not None:
        return memory_format
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def assemble(
    build: Callable[[], Module],
    component: Component,
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Module:
    """Build a network without initialising it and give it a component's weights; frozen, and in evaluation mode.

    Raises:
        InputError: a weight is missing, left over, of another shape or type, or not finite; or the configuration makes
            no network.
    """
    check_finite(component.tensors, component.source)
    network = build_network(build, component)
    expected, given = network.state_dict(), component.tensors
    check_types(component, expected)
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


def build_network(build: Callable[[], Module], component: Component) -> Module:
    """Build a network from a component's configuration, without memory for its weights.

    Raises:
        InputError: the configuration makes no network.
    """
    with explained(component.source), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build()


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Within this context the libraries build a network of the configuration in `source`.

    Raises:
        InputError: they cannot; their reasons are many, and of many types.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"the configuration of {source} makes no network ({reason}); get the model again") from error


def check_types(component: Component, expected: Mapping[str, Tensor]) -> None:
    """Refuse whole numbers and truth values where a network has weights: they would be taken for the weights.

    Raises:
        InputError: names the first.
    """
    for key, tensor in component.tensors.items():
        if key in expected and expected[key].is_floating_point() and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{component.source}: weight '{key}' is stored as {kind}; a quantised model cannot be used, "
                "get one in float32, float16, bfloat16 or float8"
            )


def _fastest_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if _has_xpu():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _has_xpu() -> bool:
    """Whether there is a GPU of Intel's; torch 2.1 does not know them."""
    return hasattr(torch, "xpu") and torch.xpu.is_available()


def _cuda_has_bfloat16() -> bool:
    """Whether the hardware has it: NVIDIA's does since Ampere, and before that torch emulates it, slowly."""
    try:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    except TypeError:  # torch 2.1 neither emulates nor knows the word
        return torch.cuda.is_bf16_supported()


@functools.cache
def _cpu_has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions. Without them it is emulated, and slower than float32. torch 2.1 cannot
    tell, Linux can."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
