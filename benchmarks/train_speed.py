"""One step of LCM-LoRA training: this trainer beside the usual script's step, written out plainly.

    python benchmarks/train_speed.py                 # Stable Diffusion 1.5's size; minutes, on a CPU half an hour
    python benchmarks/train_speed.py --size tiny     # a minute; shows that it runs, its figures say little

The usual script keeps a teacher U-Net and an online U-Net (with peft's LoRA), VAE and text encoder in memory, encodes
pictures and captions in every step, asks the teacher for the conditional and the unconditional noise apart, and takes
the online U-Net as its own target. This trainer has one U-Net, latents and text embeddings from its cache, and one
doubled teacher call; it also keeps an average of the LoRA as the target. Both train the same layers at the same rank,
with the same network, batch, number format and optimiser, on the same machine. Each runs in processes of its own, by
turns, so that peak memory (main memory on a CPU, the accelerator's elsewhere) is its alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu_sd15 import SIZES, silence_libraries
from random_model import make_networks
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.schedule import get_alphas_cumprod
from lcm_core.networks.lora_layers import TARGET_MODULES
from trainer.config import LoopConfig, StudentConfig
from trainer.machine import describe_machine, peak_memory
from trainer.methods.config import LcdConfig

LEAST_SPEED, MOST_MEMORY = 1.5, 0.6
VARIANTS = ("usual", "ours")
RANK, WORDS, W, SKIP, HUBER_C = 64, 190, 7.5, 20, 0.001
Measured = tuple[list[float], int]
"""Seconds of each step, and peak bytes after the last."""
WARM_UP = 2
"""Steps that are not timed: they allocate and choose kernels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sd15", help="architecture (default sd15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, for tiny float32")
    parser.add_argument("--resolution", type=int, help="default: 512 on CUDA, else 256; tiny 64")
    parser.add_argument("--batch-size", type=int, help="default: 8 on CUDA, else 1; tiny 4")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each process (default 5)")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each of the two (default 2)")
    parser.add_argument("--usual-float32", action="store_true", help="keep the usual script's U-Nets in float32")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # what one process measures
    args = parser.parse_args()
    is_tiny, on_cuda = args.size == "tiny", args.device.startswith("cuda")
    args.dtype = args.dtype or ("float32" if is_tiny else "bfloat16")
    args.resolution = args.resolution or (64 if is_tiny else 512 if on_cuda else 256)
    args.batch_size = args.batch_size or (4 if is_tiny else 8 if on_cuda else 1)
    if args.variant:
        print(json.dumps(measure(args)))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Let both take turns, and print the table and the verdicts."""
    print(", ".join(describe_machine(torch.device(args.device)).values()))
    print(
        f"{args.size}, {args.resolution} x {args.resolution} pixels, batch {args.batch_size}, {args.dtype}, "
        f"LoRA rank {RANK}, {args.rounds} x {args.steps} steps"
    )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name in VARIANTS:
            found[name].append(run_process(name))
    seconds = {name: statistics.median(s for run in runs for s in run["seconds"]) for name, runs in found.items()}
    peaks = {name: max(run["peak"] for run in runs) for name, runs in found.items()}
    print(f"\n{'':8}{'s/step':>10}{'images/s':>11}{'peak GB':>10}")
    for name in VARIANTS:
        print(f"{name:8}{seconds[name]:10.3f}{args.batch_size / seconds[name]:11.3f}{peaks[name] / 1e9:10.2f}")
    if args.device.startswith("cuda"):
        print_matrix_share(found["ours"][0]["flops"] / seconds["ours"], args.device)
    speed, memory = seconds["usual"] / seconds["ours"], peaks["ours"] / peaks["usual"]
    print(f"\n{speed:.2f} x the speed: {'ok' if speed >= LEAST_SPEED else 'TOO SLOW'} (bar {LEAST_SPEED})")
    print(f"{memory:.2f} x the memory: {'ok' if memory <= MOST_MEMORY else 'TOO MUCH'} (bar {MOST_MEMORY})")


def run_process(variant: str) -> dict[str, Any]:
    """Measure one variant in a new process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stderr}\nthe process that measures '{variant}' failed")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each timed step, peak bytes, and (on CUDA) the floating point operations of one step."""
    silence_libraries()
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    make = usual_step if args.variant == "usual" else our_steps
    run = make(args, device, dtype)
    flops = 0
    if device.type == "cuda":
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            run(1)
        flops = counter.get_total_flops()
        torch.cuda.reset_peak_memory_stats(device)
    seconds, peak = run(WARM_UP + args.steps)
    return {"seconds": seconds[WARM_UP:], "peak": peak, "flops": flops}


def build(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, *names: str) -> list[Any]:
    """Frozen networks of random weights, made in their own format: a float32 copy would count as peak memory."""
    torch.set_default_dtype(dtype)
    with torch.device("meta"):
        networks = make_networks(SIZES[args.size], WORDS)
    torch.set_default_dtype(torch.float32)
    chosen = [networks[name].to_empty(device=device).requires_grad_(False).eval() for name in names]
    for network in chosen:
        for weight in network.parameters():
            weight.normal_(std=0.02)
        for name, positions in network.named_buffers():
            if name.endswith("position_ids"):
                positions.copy_(torch.arange(positions.shape[-1]))
    return chosen


def usual_step(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Callable[[int], Measured]:
    """The step as the common LCM-LoRA scripts make it. Returns a function that makes some and times each."""
    from peft import LoraConfig, get_peft_model

    kept = torch.float32 if args.usual_float32 else dtype
    (teacher,), (unet,) = (build(args, device, kept, "unet") for _ in range(2))
    vae, text = build(args, device, dtype, "vae", "text_encoder")
    unet = get_peft_model(unet, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGET_MODULES)))
    learning = [p for p in unet.parameters() if p.requires_grad]  # peft keeps them in float32
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
    abar = get_alphas_cumprod().float().to(device)
    pixels = torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=device) * 2 - 1
    tokens = torch.randint(WORDS - 2, (args.batch_size, 77), device=device)
    with torch.no_grad():
        nothing = text(torch.zeros_like(tokens))[0]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def step() -> None:
        with torch.no_grad():
            latents = vae.encode(pixels.to(dtype)).latent_dist.sample().float() * vae.config.scaling_factor
            words = text(tokens)[0]
        index = torch.randint(1, len(abar) // SKIP + 1, (len(latents),), device=device)
        t = index * SKIP - 1
        s = (t - SKIP).clamp(min=0)
        at, as_ = abar[t].view(-1, 1, 1, 1), abar[s].view(-1, 1, 1, 1)
        x_t = at.sqrt() * latents + (1 - at).sqrt() * torch.randn_like(latents)
        with autocast:
            guess = boundary(unet(x_t.to(kept), t, words).sample.float(), x_t, t, at)
            with torch.no_grad():
                eps = teacher(x_t.to(kept), t, words).sample.float()
                eps_null = teacher(x_t.to(kept), t, nothing).sample.float()
                eps = eps + W * (eps - eps_null)
                x_s = as_.sqrt() * (x_t - (1 - at).sqrt() * eps) / at.sqrt() + (1 - as_).sqrt() * eps
                aim = boundary(unet(x_s.to(kept), s, words).sample.float(), x_s, s, as_)
            loss = (((guess - aim).square() + HUBER_C**2).sqrt() - HUBER_C).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def run(count: int) -> Measured:
        return [timed(step, device) for _ in range(count)], peak_memory(device)

    return run


def boundary(eps: Tensor, x: Tensor, t: Tensor, abar: Tensor) -> Tensor:
    """c_skip x + c_out x0 of arXiv 2310.04378 with sigma_data 0.5 and timesteps scaled by 10."""
    scaled = t.view(-1, 1, 1, 1) * 10.0
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
    return c_skip * x + c_out * (x - (1 - abar).sqrt() * eps) / abar.sqrt()


def timed(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def our_steps(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Callable[[int], Measured]:
    """The trainer itself, on latents and text embeddings as its cache gives them, timed from callback to callback."""
    from lcm_core.networks.unet import exact_output
    from trainer.distill import Latents, distill
    from trainer.distributed import Processes
    from trainer.students import lora_student, prepare_unet, unet_network

    (unet,) = build(args, device, dtype, "unet")
    exact_output(unet)
    config, side = StudentConfig(rank=RANK), args.resolution // 8
    prepare_unet(unet, config, (side, side))
    student = lora_student(unet, unet_network(unet, dtype), config)
    words = torch.randn(args.batch_size + 1, 77, unet.config.cross_attention_dim)
    data = Latents(
        torch.randn(args.batch_size, 4, side, side),
        {"encoder_hidden_states": words[1:]},
        {"encoder_hidden_states": words[:1]},
    )
    method = LcdConfig(w_min=W, w_max=W, original_steps=1000 // SKIP, huber_c=HUBER_C)

    def run(count: int) -> Measured:
        moments, peaks = [time.perf_counter()], []
        loop = LoopConfig(
            steps=count, batch_size=args.batch_size, learning_rate=1e-4, save_every=1e9, tensorboard=False
        )

        def note(step: int, loss: float) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            moments.append(time.perf_counter())
            peaks.append(peak_memory(device))  # now, for the state is written after the last step

        with tempfile.TemporaryDirectory() as folder:
            processes = Processes(device)
            distill(student, data, Diffusion(), method, loop, Path(folder), callback=note, processes=processes)
        return [after - before for before, after in pairwise(moments)], peaks[-1]

    return run


def print_matrix_share(rate: float, device: str) -> None:
    """Operations a second beside what a large bfloat16 matrix product reaches on the same machine."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    best = min(timed(lambda: F.linear(a, a), torch.device(device)) for _ in range(20))
    peak = 2 * 8192**3 / best
    print(f"\nours: {rate / 1e12:.1f} TFLOP/s, {rate / peak:.0%} of the {peak / 1e12:.0f} TFLOP/s of a matrix product")


if __name__ == "__main__":
    main()
