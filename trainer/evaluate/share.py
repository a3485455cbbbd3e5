"""Work that several processes share, each its part of the things, and every one gets all results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import Processes


def gather(processes: Processes, thing: Any) -> list[Any]:
    """Every process's thing, in their order."""
    if processes.size == 1:
        return [thing]
    things: list[Any] = [None] * processes.size
    torch.distributed.all_gather_object(things, thing)
    return things


def from_main(processes: Processes, make: Callable[[], Any]) -> Any:
    """What `make` returns in the main process, in all of them."""
    return gather(processes, make() if processes.is_main else None)[0]


def share(processes: Processes, total: int) -> range:
    """This process's numbers of `total` things: every `size`-th, from `rank` on."""
    return range(processes.rank, total, processes.size)


def collect(processes: Processes, part: Tensor, total: int) -> Tensor:
    """All processes' rows in order; each gives those of its `share`, (B, ...)."""
    whole = part.new_empty(total, *part.shape[1:])
    for rank, rows in enumerate(gather(processes, part)):
        whole[rank :: processes.size] = rows
    return whole
