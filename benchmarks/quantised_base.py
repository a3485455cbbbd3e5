"""Memory and loss of a LoRA on a transformer of 500 million random weights, by the format of the frozen weights.

    python benchmarks/quantised_base.py

trains in a process of its own for each format (bfloat16, int8, fp8, and nf4 where bitsandbytes is installed) and prints
a line of JSON: bytes of the network, how much more memory than before it was made the process had at its peak, and the
mean loss of the same steps, beside those of bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.networks.frozen import FORMATS, layers_of, quantise
from trainer.config import LoopConfig, StudentConfig
from trainer.distill import Latents, distill
from trainer.methods.config import LcdConfig
from trainer.state import read_checked
from trainer.students import lora_student

CPU = torch.device("cpu")
SIDE, BATCH_SIZE, CLASSES = 4, 2, 10


def make_network(kind: str, width: int, layers: int) -> nn.Module:
    """A DiT with random weights, made and stored layer by layer, so that no other format is ever whole in memory."""
    network = make_meta(width, layers)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            scale = 0.0 if name == "bias" else 1 / math.sqrt(parameter[0].numel())
            made = torch.empty(parameter.shape, dtype=torch.bfloat16)
            for part in made.split(128):  # or the layers' float32 numbers would be the peak
                part.copy_(torch.randn(part.shape, generator=generator) * scale)
            setattr(module, name, nn.Parameter(made, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros(buffer.shape))
        if kind != "bfloat16" and type(module) in (nn.Linear, nn.Conv2d):
            quantise(module, kind, CPU)
    network.eval()
    return network


def make_meta(width: int, layers: int) -> nn.Module:
    """The network without memory."""
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        return DiTTransformer2DModel(width // 64, 64, sample_size=SIDE, num_layers=layers, num_embeds_ada_norm=CLASSES)


def stored_bytes(network: nn.Module) -> int:
    """The bytes of its weights, in whatever format."""
    packed = [layer.weight for layer in layers_of(network).values() if hasattr(layer, "unpacked_weight")]
    kept = [layer.weight for layer in layers_of(network).values() if not hasattr(layer, "unpacked_weight")]
    tensors = [*network.parameters(), *kept]
    whole = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
    return whole + sum(weight.numel() * FORMATS["nf4"] // 8 for weight in packed)


def peak_memory(now: bool = False) -> int:
    """Bytes that this process has had at most, or has now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:" if now else "VmHWM:"))


def measure(kind: str, width: int, layers: int, steps: int) -> dict[str, Any]:
    """One format."""
    from diffusers import DiTTransformer2DModel  # noqa: F401  (libraries do not count)

    before = peak_memory(now=True)
    network: Any = make_network(kind, width, layers)

    def call(x: Tensor, t: Tensor, conditioning: dict[str, Any], w: Tensor | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output: Tensor = network(x, timestep=t, class_labels=conditioning["labels"]).sample
        return output[:, :4].float()

    student = lora_student(network, call, StudentConfig(rank=4), targets=("to_q", "to_k", "to_v", "to_out.0"))
    size = stored_bytes(network)
    latents = torch.randn(8, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    data = Latents(latents, {"labels": torch.arange(8)}, {"labels": torch.tensor([CLASSES - 1])})
    loop = LoopConfig(steps=steps, batch_size=BATCH_SIZE, learning_rate=1e-3, warmup_steps=0, tensorboard=False)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        distill(student, data, Diffusion(), LcdConfig(w_min=1, w_max=1), loop, Path(folder))
        log = read_checked(Path(folder) / "state.safetensors")["log"]
    return {
        "format": kind,
        "weights": sum(parameter.numel() for parameter in make_meta(width, layers).parameters()),
        "stored_mb": round(size / 1e6),
        "peak_mb": round((peak_memory() - before) / 1e6),
        "loss": float(log[:, 1].mean()),
        "seconds_per_step": round((time.perf_counter() - started) / steps, 1),
    }


def main() -> None:
    """Every format in a process of its own."""
    parser = argparse.ArgumentParser(description="Memory and loss by the format of the frozen weights.")
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--layers", type=int, default=21)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--formats", nargs="*", default=["bfloat16", *FORMATS])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = ["--width", str(args.width), "--layers", str(args.layers), "--steps", str(args.steps)]
    if args.one:
        print(json.dumps(measure(args.one, args.width, args.layers, args.steps)))
        return
    first: dict[str, Any] = {}
    for kind in args.formats:
        if kind == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            continue
        command = [sys.executable, __file__, "--one", kind, *sizes]
        # freed memory goes back to the system at once, so that the peak is that of what was held
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        found["peak_share"] = round(found["peak_mb"] / first["peak_mb"], 3)
        found["loss_share"] = round(found["loss"] / first["loss"], 4)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
