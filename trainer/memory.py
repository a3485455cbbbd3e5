"""Rehearsing a computation with tensors that have a shape but no contents, to learn how much memory it would take, and
how many operations.

The very code that trains is run, so nothing has to be known about the network; each operation only works out the shape
of its result. A step of Stable Diffusion's U-Net takes seconds and no memory: a fraction of a millisecond for each
operation, whatever its size, of which everything that looks at it takes its share.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class LiveBytes(TorchDispatchMode):
    """Adds up the memory of all tensors that are alive, and the operations that have made them.

    Attributes:
        live: bytes at this moment.
        peak: most of them so far.
        operations: additions and multiplications of matrix products, convolutions and attention so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.operations = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # what most calls ask for
        result = func(*args, **kwargs)
        if count := flop_registry.get(func.overloadpacket):
            self.operations += count(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def ignore(self, tensor: Tensor) -> None:
        """Do not count a tensor that was there before, nor what is only a view of it."""
        self._known.add(tensor.untyped_storage()._cdata)

    def _count(self, storage: Any) -> None:
        # views share a storage, which is counted once and lives as long as the last of them
        if (address := storage._cdata) in self._known:
            return
        self._known.add(address)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, address, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


@contextmanager
def rehearsal(device: torch.device, dtype: torch.dtype = torch.float32) -> Iterator[LiveBytes]:
    """Let every new tensor, within this context, be without contents, on `device`, and by default of `dtype`."""
    before = torch.get_default_dtype()
    with FakeTensorMode(), LiveBytes() as memory, torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_default_dtype(dtype)
        try:
            yield memory
        finally:
            torch.set_default_dtype(before)
