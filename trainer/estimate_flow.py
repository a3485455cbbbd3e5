"""What a run with a model of a family will need, as far as its files say it without loading it.

Activations are not among it: they depend on the length of the texts, which the text encoders alone know.
"""

from __future__ import annotations

from typing import Any

import torch

from lcm_core.files.checkpoint import read_component
from lcm_core.networks.device import explained
from lcm_core.networks.frozen import FORMATS
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
) -> tuple[dict[str, int], int]:
    """Bytes by what they are for, and how many parameters are trainable.

    Args:
        config: the run's settings.
        processes: those of the run.
        teacher: the model.
        networks: networks of the student's size that are trained.
    """
    weights = read_component(teacher.source.unet, "unet").tensors.values()
    count = sum(tensor.numel() for tensor in weights)
    precision = choose_precision(processes.device, config.student.precision, count, scales_loss=True)
    trained = trained_weights(config, teacher)
    per_weight = 2 if config.training.optimizer == "adamw8bit" else 8
    table = {
        "frozen weights": small_bytes(count * precision.itemsize, config.student, precision),
        "trainable parameters": 4 * trained * networks,
        "their moving average": 4 * trained if config.training.ema_decay > 0 else 0,
        "optimiser": per_weight * trained * networks,
    }
    return {name: value for name, value in table.items() if value}, trained


def small_bytes(size: int, student: StudentConfig, precision: torch.dtype) -> int:
    """Bytes of frozen weights that take so many in the format of the computation."""
    return size * FORMATS[student.base_dtype] // (8 * precision.itemsize) if student.base_dtype else size


def trained_weights(config: DistillConfig, teacher: Teacher) -> int:
    """Numbers in the LoRA, or in a full student."""
    import diffusers

    if config.student.kind == "full":
        weights = read_component(teacher.source.unet, "unet")
        return count_weights(with_guidance(weights, config.student.guidance_embedding_dim))

    source = teacher.source
    assert source.family is not None
    component = read_component(source.unet, "unet")
    with rehearsal(Processes().device):
        kind: Any = getattr(diffusers, source.family.network)
        with explained(component.source):
            network = kind.from_config(dict(component.config))
        targets = config.student.target_modules or source.family.lora_targets
        adapters = add_lora(network, config.student.rank, config.student.alpha or None, targets)
        return sum(half.numel() for half in adapters.parameters())
