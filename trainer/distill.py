"""Distillation: `distill` trains any student on any latents; `trainer.run` puts a whole run around it.

A host that already has a network in memory needs three things of its own: a `Network`, i.e. a function
`(x_t, t, conditioning, w) -> model output`; latents with their conditioning as tensors; and its `Diffusion`:

>>> student = lora_student(module, network, StudentConfig(rank=16))  # doctest: +SKIP
>>> data = Latents(latents, conditioning, null_conditioning)  # doctest: +SKIP
>>> distill(student, data, diffusion, LcdConfig(), loop, folder, callback=report)  # doctest: +SKIP
>>> tensors = lora_state_dict(module, ema=True)  # doctest: +SKIP
>>> remove_lora(module)  # doctest: +SKIP

`callback(step, loss)` may raise any exception to stop; the state is saved in `folder` before it goes on up, and the
same call continues there. Calling from another thread than the main one is fine. A host that runs everything in
torch.inference_mode must leave it (`with torch.inference_mode(False)`) around all five lines: tensors that are made in
it cannot be trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion
from trainer.config import LoopConfig
from trainer.cuda_graphs import graphed_sample
from trainer.data.cache import Batch
from trainer.distributed import Processes
from trainer.loop import AfterStep, train
from trainer.methods.config import MethodConfig
from trainer.methods.method import get_method, make_sample
from trainer.methods.shared import Sample
from trainer.students import Student


class BatchSource(Protocol):
    """Where batches come from: `trainer.data.cache.LatentCache`, or `Latents`."""

    def draw(self, size: int, generator: torch.Generator, caption_dropout: float = 0.0) -> Sequence[Any]:
        """Choose the samples of a batch; everything random comes from the generator."""

    def read(self, picks: Any) -> Batch:
        """Fetch some of the chosen samples."""


@dataclass(frozen=True)
class Latents:
    """Latents that are in memory already.

    Attributes:
        latents: (N, C, h, w), scaled as the U-Net wants.
        conditioning: tensors (N, ...) and dicts of them, as the network is given them.
        null_conditioning: the same of the empty prompt, (1, ...).
    """

    latents: Tensor
    conditioning: Mapping[str, Any]
    null_conditioning: Mapping[str, Any]

    def draw(self, size: int, generator: torch.Generator, caption_dropout: float = 0.0) -> list[tuple[int, bool]]:
        """Numbers of random samples, and whether their captions are dropped."""
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < caption_dropout
        return list(zip(chosen.tolist(), dropped.tolist(), strict=True))

    def read(self, picks: Sequence[tuple[int, bool]]) -> Batch:
        """The samples that were drawn."""
        rows, dropped = torch.tensor([row for row, _ in picks]), torch.tensor([drop for _, drop in picks])
        null = _take(self.null_conditioning, torch.zeros_like(rows))
        conditioning = _replace(_take(self.conditioning, rows), null, dropped)
        return Batch(self.latents.cpu()[rows], conditioning, null)


def distill(
    student: Student,
    data: BatchSource,
    diffusion: Diffusion,
    method: MethodConfig,
    loop: LoopConfig,
    folder: Path,
    caption_dropout: float = 0.0,
    callback: AfterStep | None = None,
    processes: Processes | None = None,
    graphs: bool = False,
) -> None:
    """Train a student, from the last saved state in `folder` to the last step.

    Args:
        student: from `lora_student` or `full_student`.
        data: latents and conditioning.
        diffusion: the teacher's.
        method: how it learns.
        loop: how long and how fast.
        folder: keeps the state and the log.
        caption_dropout: share of captions replaced by the empty prompt.
        callback: (step, loss) after each step; may raise to stop.
        processes: those that share the work.
        graphs: on a CUDA GPU, run each loss as one CUDA graph: for small networks, whose many kernels take longer to
            start than to run. For one process, whole batches, and methods without a critic.

    Raises:
        InputError: settings that do not fit together, a state of another run, or a loss that is not finite.
    """
    diffusion = for_method(diffusion, method)
    processes, chosen = processes or Processes(), get_method(method)
    parts = processes.rows(loop.batch_size, loop.accumulation)
    mine = slice(parts[0].start, parts[-1].stop)
    device = next(student.trained.parameters()).device

    def plain_loss(sample: Sample) -> Tensor:
        return chosen.loss(student.networks, sample, diffusion, method).sum() / loop.batch_size

    trained = [p for p in student.trained.parameters() if p.requires_grad]
    loss_of = graphed_sample(plain_loss, trained, device) if graphs else plain_loss

    def loss_fn(step: int, generator: torch.Generator) -> Iterator[Tensor]:
        picks = data.draw(loop.batch_size, generator, caption_dropout)
        batch = data.read(picks[mine])
        if student.reads_guidance:
            batch = replace(batch, null_conditioning=None)
        sample = make_sample(batch, method, diffusion, generator, loop.batch_size, mine.start, step)
        for part in parts:
            rows = sample.part(slice(part.start - mine.start, part.stop - mine.start)).to(device)
            yield loss_of(rows)

    scale = student.scales_loss
    train(student.trained, loss_fn, loop, folder, student.average, callback, processes, student.critic, scale)


def for_method(diffusion: Diffusion, method: MethodConfig) -> Diffusion:
    """The teacher's diffusion with the grid that the method trains on.

    Raises:
        InputError: a grid that the process does not have.
    """
    return replace(diffusion, original_steps=method.original_steps)


def _take(conditioning: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    return {
        key: _take(value, rows) if isinstance(value, Mapping) else value.cpu()[rows]
        for key, value in conditioning.items()
    }


def _replace(conditioning: dict[str, Any], other: dict[str, Any], where: Tensor) -> dict[str, Any]:
    """Rows of `other` where `where` is true, (B,)."""
    if not bool(where.any()):
        return conditioning
    replaced: dict[str, Any] = {}
    for key, value in conditioning.items():
        if isinstance(value, dict):
            replaced[key] = _replace(value, other[key], where)
        else:
            replaced[key] = torch.where(where.view(-1, *[1] * (value.ndim - 1)), other[key], value)
    return replaced
