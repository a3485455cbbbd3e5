"""What each process of the tests of several processes runs."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lcm_core.diffusion.diffusion import Diffusion
from trainer.config import LoopConfig, StudentConfig
from trainer.distill import Latents, distill
from trainer.distributed import join_processes
from trainer.methods.config import Dmd2Config, LcdConfig
from trainer.methods.shared import Networks
from trainer.sharded import shard_student
from trainer.students import Student, lora_student


class Block(nn.Module):
    """A layer for the conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(3, 4)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        return self.to_q(context).mean(1)


class Network(nn.Module):
    """A convolution and a block."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.block = Block()

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return (self.conv1(x) + self.block(context)[:, :, None, None] + t[:, None, None, None] / 1000).tanh()


class Mortal(Latents):
    """Data whose second process is killed when it asks for a step."""

    def draw(self, size: int, generator: torch.Generator, caption_dropout: float = 0.0) -> list[tuple[int, bool]]:
        step = generator.initial_seed()  # of runs with seed 0
        if os.environ.get("RANK") == "1" and os.environ.get("KILLED_AT") == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(size, generator, caption_dropout)


def full(module: Network) -> Student:
    """A student that is the whole network, with a teacher of its own."""

    def ask(network: nn.Module) -> Callable[..., torch.Tensor]:
        return lambda x, t, c, w: network(x, t, c["context"])

    average, teacher = (copy.deepcopy(module).requires_grad_(False) for _ in range(2))
    networks = Networks(ask(module), ask(average), ask(teacher), ask(teacher))
    return Student(networks, module, average, module, teacher_unet=teacher)


def main(folder: str, steps: str, accumulation: str = "2", kind: str = "lcd", sharded: str = "") -> None:
    """Distil up to `steps`, with whatever processes there are."""
    torch.manual_seed(0)
    module = Network()
    with_critic = {"with_critic": kind == "dmd2"}
    if kind == "full":
        student = full(module)
    else:
        call = lambda x, t, c, w: module(x, t, c["context"])  # noqa: E731
        student = lora_student(module, call, StudentConfig(rank=2), **with_critic)
    draw = torch.Generator().manual_seed(0)
    latents, context = torch.randn(9, 4, 8, 8, generator=draw), torch.randn(9, 5, 3, generator=draw)
    data = Mortal(latents, {"context": context}, {"context": torch.zeros(1, 5, 3)})
    loop = LoopConfig(
        int(steps), 6, 3e-2, warmup_steps=1, cooldown=0.0, ema_decay=0.9, accumulation=int(accumulation), save_every=0
    )
    processes = join_processes(torch.device("cpu"))
    if sharded:
        shard_student(student, processes)
    method = Dmd2Config(phases=2, critic_updates=2) if kind == "dmd2" else LcdConfig(loss="l2", noise_offset=0.1)
    distill(student, data, Diffusion(), method, loop, Path(folder), 0.3, processes=processes)
    processes.wait()
