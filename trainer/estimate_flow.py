"""What a run with a model of a family will need, as far as its files say it without loading it.

Activations are not among it: they depend on the length of the texts, which the text encoders alone know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lcm_core.files.checkpoint import read_component
from lcm_core.networks.device import explained
from lcm_core.networks.frozen import FORMATS, large_layers
from lcm_core.networks.lora_layers import add_lora
from trainer.config import DistillConfig, StudentConfig
from trainer.data.teacher import Teacher
from trainer.disk import count_weights
from trainer.distributed import Processes
from trainer.memory import rehearsal
from trainer.starts import with_guidance
from trainer.students import choose_precision


def flow_memory(
    config: DistillConfig, processes: Processes, teacher: Teacher, networks: int
) -> tuple[dict[str, int], int, int]:
    """Bytes by what they are for, how many parameters are trainable, and bytes of weights that rest in main memory.

    Args:
        config: the run's settings.
        processes: those of the run.
        teacher: the model.
        networks: networks of the student's size that are trained.
    """
    weights = read_component(teacher.source.unet, "unet").tensors.values()
    count = sum(tensor.numel() for tensor in weights)
    precision = choose_precision(processes.device, config.student.precision, count, scales_loss=True)
    trained, large = trained_weights(config, teacher)
    resident, resting = frozen_weights(count * precision.itemsize, config.student, precision, large)
    per_weight = 2 if config.training.optimizer == "adamw8bit" else 8
    table = {
        "frozen weights": resident,
        "trainable parameters": 4 * trained * networks,
        "their moving average": 4 * trained if config.training.ema_decay > 0 else 0,
        "optimiser": per_weight * trained * networks,
    }
    return {name: value for name, value in table.items() if value}, trained, resting


def small_bytes(size: int, student: StudentConfig, precision: torch.dtype) -> int:
    """Bytes of frozen weights that take so many in the format of the computation."""
    return size * FORMATS[student.base_dtype] // (8 * precision.itemsize) if student.base_dtype else size


def frozen_weights(size: int, student: StudentConfig, precision: torch.dtype, large: Sequence[int]) -> tuple[int, int]:
    """Bytes of the frozen weights on the device, under `offload` with room for the largest; and of those that rest in
    main memory.

    Args:
        size: of all, in the format of the computation.
        student: the settings.
        precision: that format.
        large: numbers in the weights of each layer that may rest, see `large_layers`.
    """
    if not student.offload:
        return small_bytes(size, student, precision), 0
    resting = sum(large) * precision.itemsize
    return size - resting + max(large, default=0) * precision.itemsize, small_bytes(resting, student, precision)


def trained_weights(config: DistillConfig, teacher: Teacher) -> tuple[int, list[int]]:
    """Numbers in the LoRA, or in a full student; and in each large layer under a LoRA."""
    import diffusers

    if config.student.kind == "full":
        weights = read_component(teacher.source.unet, "unet")
        return count_weights(with_guidance(weights, config.student.guidance_embedding_dim)), []

    source = teacher.source
    assert source.family is not None
    component = read_component(source.unet, "unet")
    with rehearsal(Processes().device):
        kind: Any = getattr(diffusers, source.family.network)
        with explained(component.source):
            network = kind.from_config(dict(component.config))
        large = [layer.weight.numel() for layer in large_layers(network)]
        targets = config.student.target_modules or source.family.lora_targets
        adapters = add_lora(network, config.student.rank, config.student.alpha or None, targets)
        return sum(half.numel() for half in adapters.parameters()), large
