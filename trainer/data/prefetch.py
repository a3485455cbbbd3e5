"""Work that does not need the GPU, done ahead of it by other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """`make(0)`, `make(1)`, ... as they are asked for, or made ahead by worker processes: the same things either way.

    Args:
        make: what to compute for a number; tensors, on the CPU, or tuples and lists of them.
        count: how many numbers there are.
        workers: processes that work ahead; 0 to compute each thing when it is asked for. They are forked, so that
            `make` may be any function and what it reads is shared, not copied: not on Windows.
    """

    def __init__(self, make: Callable[[int], Item], count: int, workers: int = 0) -> None:
        self.make, self.count, self.workers = make, count, workers
        self._next = -1
        self._ahead: Iterator[Item] = iter(())

    def __call__(self, number: int) -> Item:
        """What `make(number)` gives. Quick where the numbers are asked for one after another."""
        if not self.workers:
            return self.make(number)
        if number != self._next:
            self._ahead = iter(self._load_from(number))
        self._next = number + 1
        return next(self._ahead)

    def _load_from(self, first: int) -> DataLoader[Item]:
        return DataLoader(
            _Numbered(self.make, self.count),
            batch_size=None,
            sampler=range(first, self.count),
            num_workers=self.workers,
            multiprocessing_context="fork",
            prefetch_factor=4,
        )


class _Numbered(Dataset[Item]):
    """`make`, as a data set."""

    def __init__(self, make: Callable[[int], Item], count: int) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Item:
        return self.make(number)
