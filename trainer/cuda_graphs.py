"""Losses of small networks by CUDA graphs: the whole forward and backward pass becomes one launch.

A small network's step is thousands of kernels of a few microseconds each, and starting them one by one takes many
times as long as running them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.methods.shared import Sample, each

TensorLoss = Callable[..., Tensor]
"""A function from tensors to a scalar loss."""
_WARM_UPS = 3  # in which libraries choose their kernels and allocate what they keep


def graphed(loss: TensorLoss, parameters: Iterable[nn.Parameter], device: torch.device) -> TensorLoss:
    """The same loss, by CUDA graphs where the device is a CUDA GPU.

    Args:
        loss: draws no random numbers, reads nothing back from the GPU and copies nothing to it.
        parameters: all that the loss trains.
    """
    return GraphedLoss(loss, list(parameters), device) if device.type == "cuda" else loss


def graphed_sample(
    loss: Callable[[Sample], Tensor], parameters: Iterable[nn.Parameter], device: torch.device
) -> Callable[[Sample], Tensor]:
    """`graphed` for the loss of a distillation's `Sample`, all of whose tensors are on the device."""
    outline: list[Sample] = []  # samples of one run differ in their tensors alone

    def of_tensors(*tensors: Tensor) -> Tensor:
        following = iter(tensors)
        return loss(each(outline[0], lambda _: next(following)))

    of_graph = graphed(of_tensors, parameters, device)

    def of_sample(sample: Sample) -> Tensor:
        tensors: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        each(sample, note)
        outline[:] = [sample]
        return of_graph(*tensors)

    return of_sample


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    loss: Tensor
    gradients: list[Tensor | None]


class GraphedLoss:
    """A loss that also sets the parameters' gradients; its own `backward` adds nothing. One graph for each shape."""

    def __init__(self, loss: TensorLoss, parameters: list[nn.Parameter], device: torch.device) -> None:
        self.loss, self.parameters, self.device = loss, parameters, device
        self._graphs: dict[tuple[torch.Size, ...], _Captured] = {}
        self._pool: Any = None  # where all graphs take their memory from

    def __call__(self, *tensors: Tensor) -> Tensor:
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture([tensor.to(self.device, copy=True) for tensor in tensors])
        captured = self._graphs[shapes]
        for place, tensor in zip(captured.inputs, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        captured.graph.replay()
        for parameter, gradient in zip(self.parameters, captured.gradients, strict=True):
            parameter.grad = gradient
        return captured.loss.detach().requires_grad_()

    def _capture(self, inputs: list[Tensor]) -> _Captured:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._forget_gradients()
                self.loss(*inputs).backward()
        torch.cuda.current_stream(self.device).wait_stream(side)
        self._forget_gradients()  # so that the graph makes them anew in memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self.loss(*inputs)
            loss.backward()
        self._pool = graph.pool()
        return _Captured(graph, inputs, loss, [parameter.grad for parameter in self.parameters])

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
