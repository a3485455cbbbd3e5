"""Several processes that train one model: who they are, and adding up what each has computed. Through accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lcm_core.errors import InputError

_BUCKET = 32_000_000  # gradients sent at once


@dataclass(frozen=True)
class Processes:
    """The processes of one run; by default this one alone."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def rows(self, batch_size: int, accumulation: int) -> list[slice]:
        """This process's rows of a batch, in as many parts as it takes them in.

        Raises:
            InputError: fewer rows than parts in all processes.
        """
        parts = self.size * accumulation
        if batch_size < parts:
            raise InputError(
                f"batch_size={batch_size} is too small for {self.size} processes with accumulation={accumulation}; "
                f"use at least {parts}"
            )
        edges = [i * batch_size // parts for i in range(parts + 1)]
        mine = range(self.rank * accumulation, (self.rank + 1) * accumulation)
        return [slice(edges[i], edges[i + 1]) for i in mine]

    def total(self, values: Sequence[float]) -> list[float]:
        """Numbers, each added up over all processes."""
        if self.size == 1:
            return list(values)
        return self._sum(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in place, in buckets: many small messages would take longer."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            # every process must send the same tensors, also one whose part did not reach this parameter
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            bucket.append(parameter.grad)
            if sum(gradient.numel() for gradient in bucket) >= _BUCKET:
                self._add(bucket)
                bucket = []
        self._add(bucket)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            _accelerate_state(self.device).wait_for_everyone()

    def _add(self, bucket: list[Tensor]) -> None:
        if bucket:
            total = self._sum(torch.cat([gradient.flatten() for gradient in bucket]))
            for gradient, part in zip(bucket, total.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _sum(self, tensor: Tensor) -> Tensor:
        from accelerate.utils import reduce

        result: Tensor = reduce(tensor, reduction="sum")
        return result


def join_processes(device: torch.device) -> Processes:
    """The processes that `accelerate launch` (or torchrun) started, each with its own device; else this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(device)
    state = _accelerate_state(device)
    return Processes(state.device, state.process_index, state.num_processes)


def _accelerate_state(device: torch.device) -> Any:
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InputError("several processes need accelerate; install it, or start one process") from error
    return PartialState(cpu=device.type == "cpu")
