"""Time that sampling costs outside the network, per step, beside diffusers' LCMScheduler.

    python benchmarks/step_overhead.py

The network is a function that returns a tensor made beforehand, and what calling it costs is subtracted. Latents are
(1, 4, 64, 64), float32, on the CPU; both sides draw their own noise from a seeded CPU generator. Rounds alternate, and
the median counts. Needs diffusers for the comparison.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcm_core.diffusion.consistency import ConsistencyDenoiser
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_sigmas_lcm
from lcm_core.diffusion.guidance import guide
from lcm_core.diffusion.samplers import initial_latents, initial_noise, sample_lcm, seeded_noise_sampler

SHAPE = (4, 64, 64)
BAR_MS = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps per picture (default 8)")
    parser.add_argument("--rounds", type=int, default=200, help="pictures per contestant (default 200)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    contestants = {
        "sample_lcm, guidance 1": ours(args.steps, guidance_scale=1.0, guidance_embedding_dim=None),
        "sample_lcm, w guidance": ours(args.steps, guidance_scale=8.0, guidance_embedding_dim=256),
        "diffusers LCMScheduler.step": theirs(args.steps),
    }
    network = network_call(args.steps)
    medians = measure({**contestants, "network stand-in": network}, args.rounds, args.steps)
    base = medians.pop("network stand-in")
    peer = medians["diffusers LCMScheduler.step"] - base
    print(f"ms per step outside the network, (1, 4, 64, 64), {args.steps} steps, {torch.get_num_threads()} threads")
    for name, median in medians.items():
        net = median - base
        verdict = "" if name.startswith("diffusers") else f"   {'ok' if net <= BAR_MS else 'OVER'} (bar {BAR_MS} ms)"
        print(f"{name:30} {net:.3f}   ratio to diffusers {net / peer:.2f}{verdict}")


def network() -> Callable[..., Tensor]:
    output = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))

    def unet(x: Tensor, t: Tensor, **extra_args: Any) -> Tensor:
        return output

    return unet


def ours(steps: int, guidance_scale: float, guidance_embedding_dim: int | None) -> Callable[[], Tensor]:
    diffusion = Diffusion()
    sigmas = get_sigmas_lcm(diffusion.process, steps)
    cond = {"encoder_hidden_states": torch.zeros(1, 77, 768)}
    denoiser = ConsistencyDenoiser(network(), diffusion)
    x = initial_latents(initial_noise([0], SHAPE), sigmas[0])
    noise_sampler = seeded_noise_sampler([0], SHAPE)

    def picture() -> Tensor:
        model = guide(denoiser, cond, None, guidance_scale, guidance_embedding_dim)
        return sample_lcm(model, x, sigmas, disable=True, noise_sampler=noise_sampler)

    return picture


def theirs(steps: int) -> Callable[[], Tensor]:
    from diffusers import LCMScheduler

    scheduler: Any = LCMScheduler()
    unet = network()
    start = initial_noise([0], SHAPE)
    generator = torch.Generator().manual_seed(0)

    def picture() -> Tensor:
        scheduler.set_timesteps(steps)
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(unet(scheduler.scale_model_input(x, t), t), t, x, generator=generator).prev_sample
        return x

    return picture


def network_call(steps: int) -> Callable[[], None]:
    unet, x, t = network(), torch.zeros(1, *SHAPE), torch.zeros(1)
    text = torch.zeros(1)

    def calls() -> None:
        for _ in range(steps):
            unet(x, t, encoder_hidden_states=text)

    return calls


def measure(contestants: dict[str, Callable[[], Any]], rounds: int, steps: int) -> dict[str, float]:
    """Median milliseconds per step; rounds alternate, so that a busy moment hits all contestants alike."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 10):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if i >= 10:  # the first rounds warm up
                times[name].append((time.perf_counter() - start) * 1000 / steps)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
