"""How much memory a run of LCM Distiller will take, by rehearsing a step with tensors that have no contents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.memory import LiveBytes
from trainer.students import Student

from .frozen import weights_of

_PER_WEIGHT = 4 + 4 + 4 + 8  # bytes: it, its average, its gradient and two moments


def describe_memory(student: Student, conditioning: dict[str, Tensor], shape: Sequence[int], device: Any) -> str:
    """The peak of a run on a device, in words.

    Args:
        student: whose adapters are on the device already.
        conditioning: of one batch, real numbers of prompts (B,).
        shape: of one latent, (1, C, ...).
        device: where it runs.
    """
    halves = [part for part in (student.trained, student.average, student.critic) if part is not None]
    adapters = {id(weight) for part in halves for weight in part.parameters()}
    frozen = [weight for weight in weights_of(student.unet) if weight.device == device and id(weight) not in adapters]
    learning = sum(weight.numel() for part in halves if part is not student.average for weight in part.parameters())
    parts = {"frozen weights": sum(weight.nbytes for weight in frozen), "LoRA and optimiser": learning * _PER_WEIGHT}
    try:
        parts["activations"] = _activations(student, conditioning, shape, device)
        kind = "about"
    except Exception:  # whatever a host's network asks of the contents of a tensor
        kind = "more than"  # the activations come on top
    named = ", ".join(f"{size / 1e9:.2f} GB {name}" for name, size in parts.items())
    return f"{kind} {sum(parts.values()) / 1e9:.2f} GB of memory at the peak: {named}"


def _activations(student: Student, conditioning: dict[str, Tensor], shape: Sequence[int], device: Any) -> int:
    """Bytes that a step creates: the teacher on both halves of its guidance, then the student with its gradients."""
    twice = {name: torch.cat([rows, rows]) for name, rows in conditioning.items()}
    batch = len(next(iter(conditioning.values())))
    trained, networks = list(student.trained.parameters()), student.networks
    x, t = torch.zeros((batch, *shape[1:]), device=device), torch.full((batch,), 500.0, device=device)
    with torch.no_grad():  # in earnest, once: what a network keeps for later calls must have contents
        networks.teacher(torch.cat([x, x]), torch.cat([t, t]), twice, None)
        networks.online(x, t, conditioning, None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, LiveBytes() as memory:
        for weight in weights_of(student.unet):
            memory.ignore(mode.from_tensor(weight))
        x, t = torch.empty((batch, *shape[1:]), device=device), torch.full((batch,), 500.0, device=device)
        with torch.no_grad():
            networks.teacher(torch.cat([x, x]), torch.cat([t, t]), twice, None)
        with torch.autograd.graph.saved_tensors_hooks(_as_is, _as_is):  # without a check for what is changed in place
            output = networks.online(x, t, conditioning, None)
            torch.autograd.grad(output.square().mean(), trained, allow_unused=True)
        return memory.peak


def _as_is(tensor: Tensor) -> Tensor:
    return tensor
