"""What this machine is, and how much memory this process has used on it; for reports and benchmarks."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> dict[str, str]:
    """Processor, accelerator, threads and library versions, as words."""
    words = {"processor": _processor(), "threads": str(torch.get_num_threads()), "memory": _memory()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        words["accelerator"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    elif device.type != "cpu":
        words["accelerator"] = device.type
    return {**words, "torch": torch.__version__, "python": platform.python_version(), "system": platform.system()}


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held at once: on the accelerator, or of main memory on a CPU.

    0 where the system does not say (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    # macOS counts in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"
