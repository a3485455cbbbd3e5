"""Several processes that train one model: who they are, through accelerate, and adding up what each has computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lcm_core.errors import InputError


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

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            _accelerate_state(self.device).wait_for_everyone()

    def _sum(self, tensor: Tensor) -> Tensor:
        from accelerate.utils import reduce

        result: Tensor = reduce(tensor, reduction="sum")
        return result


class Gradients:
    """Gradients of some modules' parameters, added up over all processes while the backward pass goes on.

    The sums are torch's DistributedDataParallel's, but sums instead of means: each process gives its own share of the
    loss. Parameters that no process has reached stay without a gradient.

    Args:
        modules: hold the parameters.
        processes: those of the run.
        parts: how many losses each process gives for a step; the last one's backward pass sends.
    """

    def __init__(self, modules: Sequence[nn.Module], processes: Processes, parts: int) -> None:
        self.parts, self._shared = parts, None
        parameters = [parameter for module in modules for parameter in module.parameters()]
        if processes.size > 1 and not is_shared_out(parameters):  # these add up by themselves
            self._shared = DistributedDataParallel(_Together(modules), find_unused_parameters=True)
            # torch reads the types of a hook's arguments, but not as the texts that they are in this file
            self._shared.register_comm_hook(None, lambda state, bucket: _add_up(bucket))

    def add(self, losses: Iterable[Tensor], scaler: torch.amp.GradScaler) -> float:
        """Add the gradients of a step's losses, part by part, each freed before the next is asked for. Returns the sum
        of the losses of this process.

        Raises:
            ValueError: of several processes, one gives another number of parts.
        """
        total: Tensor | float = 0.0
        if self._shared is None:
            for part in losses:
                total = total + _backward(part, scaler)
            return float(total)
        waiting = iter(losses)
        for number in range(self.parts):
            with nullcontext() if number + 1 == self.parts else self._shared.no_sync():
                total = total + _backward(self._shared(partial(next, waiting)), scaler)
        if next(waiting, None) is not None:
            raise ValueError(f"a step has more than {self.parts} parts")
        return float(total)


class _Together(nn.Module):
    """Modules with parameters, whose forward pass is whatever computes a loss from them."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()


def is_shared_out(parameters: Iterable[Tensor]) -> bool:
    """Whether each process has only its part of some of these, see `trainer.sharded`."""
    return any(hasattr(parameter, "to_local") for parameter in parameters)


def whole(value: Tensor) -> Tensor:
    """A tensor with the parts of all processes, which must all ask for it."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def own_part(value: Tensor) -> Tensor:
    """What this process has of a tensor, in its place."""
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local


def shared_out_like(value: Tensor, parameter: Any) -> Tensor:
    """A whole tensor, as each process has it, in parts as a parameter is; nothing is sent."""
    if not hasattr(parameter, "to_local"):
        return value
    from torch.distributed.tensor import distribute_tensor

    there = value.to(parameter.device)
    return distribute_tensor(there, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _backward(loss: Tensor, scaler: torch.amp.GradScaler) -> Tensor:
    scaler.scale(loss).backward()
    return loss.detach()


def _add_up(bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
    sent: Any = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    summed: torch.futures.Future[Tensor] = sent.get_future().then(lambda done: done.value()[0])
    return summed


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
