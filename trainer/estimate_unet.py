"""What a run with a U-Net will need while it trains: a rehearsal of one step, without contents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lcm_core.diffusion.flow_map import EMBEDDING_DIM
from lcm_core.files.checkpoint import Component
from lcm_core.networks.device import explained
from lcm_core.networks.frozen import large_layers
from trainer.config import DistillConfig
from trainer.control import control_size
from trainer.data.teacher import Teacher
from trainer.discriminator import has_discriminator, head_weights
from trainer.disk import TOKENS, count_weights, trained_networks
from trainer.distributed import Processes
from trainer.estimate_flow import frozen_weights
from trainer.memory import LiveBytes, rehearsal
from trainer.methods.gan import discriminator_on, make_head
from trainer.methods.method import Method, get_method
from trainer.methods.shared import Networks, absent
from trainer.speed import rough_seconds
from trainer.students import choose_precision, lora_student, prepare_unet, unet_network

LIBRARIES = 450_000_000
"""Bytes of main memory that Python and its libraries take before a model is loaded; matters on a CPU only."""


def unet_memory(
    config: DistillConfig, processes: Processes, unet: Component, side: int
) -> tuple[dict[str, int], int, float, int]:
    """Bytes by what they are for, the number of trainable parameters, about how many seconds the training takes, and
    bytes of weights that rest in main memory."""
    student, training, device = config.student, config.training, processes.device
    precision = choose_precision(device, student.precision, count_weights(unet), scales_loss=True)
    part = max(rows.stop - rows.start for rows in processes.rows(training.batch_size, training.accumulation))
    with explained(unet.source), rehearsal(device, precision) as memory:
        fixed, large, trained, step = _build(config, unet, precision, (side, side))
        before = memory.live
        operations = step(memory, part)
        transient = memory.peak - before
    resident, resting = frozen_weights(fixed, student, precision, large)
    per_weight = 2 if training.optimizer == "adamw8bit" else 8  # two moments
    trainable = trained * trained_networks(config) + head_weights(config.method, unet.config)
    table = {
        "frozen weights": resident,
        "trainable parameters": 4 * trainable,
        "their moving average": 4 * trained if training.ema_decay > 0 else 0,
        "optimiser": per_weight * trainable,
        "activations and gradients": transient,
        "control": control_size(config, Teacher(config.teacher).source) * precision.itemsize,
        "libraries": LIBRARIES if device.type == "cpu" else 0,
    }
    seconds = rough_seconds(training.steps * training.accumulation * operations, device, precision)
    return {name: value for name, value in table.items() if value}, trained, seconds, resting


def _build(
    config: DistillConfig, unet: Component, precision: torch.dtype, size: tuple[int, int]
) -> tuple[int, list[int], int, Callable[[LiveBytes, int], int]]:
    """Inside a rehearsal: bytes of the frozen weights, numbers in each large layer's, number of trainable parameters,
    and one step on part of a batch, which gives its operations."""
    is_lora, method = config.student.kind == "lora", get_method(config.method)
    torch.set_default_dtype(precision)
    teacher = _network(unet.config, config, size).requires_grad_(False) if is_lora or method.needs_teacher else None
    torch.set_default_dtype(torch.float32)
    call = None if teacher is None else unet_network(teacher, precision)
    frozen = 0 if teacher is None else _bytes(teacher)
    large = [] if teacher is None else [layer.weight.numel() for layer in large_layers(teacher)]
    if is_lora:
        assert teacher is not None
        assert call is not None
        student = lora_student(teacher, call, config.student, with_average=False, with_critic=method.needs_critic)
        networks, trained = student.networks, student.trained
    else:
        width = unet.config.get("time_cond_proj_dim") or config.student.guidance_embedding_dim
        width += EMBEDDING_DIM if method.needs_end else 0
        trained, critic = (_network({**unet.config, "time_cond_proj_dim": width}, config, size) for _ in range(2))
        online = unet_network(trained, precision)
        networks = Networks(online, online, call or online, unet_network(critic, precision))
    if has_discriminator(config.method):
        judging: Any = teacher if is_lora else critic
        head = make_head(unet.config["block_out_channels"][-1])
        networks = networks._replace(discriminator=discriminator_on(networks.critic, judging.mid_block, head))
    number = sum(p.numel() for p in trained.parameters())
    is_tight = config.student.gradient_checkpointing
    return frozen, large, number, partial(_rehearse_step, networks, unet.config, method, size, is_tight)


def _rehearse_step(
    networks: Networks,
    unet: Mapping[str, Any],
    method: Method,
    size: tuple[int, int],
    is_tight: bool,
    memory: LiveBytes,
    part: int,
) -> int:
    """The calls of one step that decide its peak, on part of a batch: those that are trained with their backward pass,
    and the teacher on both halves where checkpointing keeps so little that it may take more. Returns the operations of
    the whole step; a rehearsed call takes seconds, so that those of the others are told by the first."""
    x, t, w = torch.empty(part, unet["in_channels"], *size), torch.zeros(part, dtype=torch.int64), torch.empty(part)
    if is_tight and method.needs_teacher:
        with torch.no_grad():
            networks.teacher(torch.cat([x, x]), torch.cat([t, t]), _conditioning(unet, 2 * part), None)
    trained = [networks.online, networks.critic] if method.needs_critic else [networks.online]
    if networks.discriminator is not absent:
        trained += [networks.discriminator] * 2  # of real and of painted pictures
    before = memory.operations
    outputs = [call(x, t, _conditioning(unet, part), w) for call in trained]
    asked = memory.operations - before
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    others = 1 + 2 * method.needs_teacher  # calls like one of them: the target, and both halves
    return memory.operations - before + others * asked // len(trained)


def _conditioning(unet: Mapping[str, Any], count: int) -> dict[str, Any]:
    cond: dict[str, Any] = {"encoder_hidden_states": torch.empty(count, TOKENS, unet["cross_attention_dim"])}
    if unet.get("addition_embed_type") == "text_time":
        width = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        added = {"text_embeds": torch.empty(count, width), "time_ids": torch.empty(count, 6)}
        cond["added_cond_kwargs"] = added
    return cond


def _network(unet: Mapping[str, Any], config: DistillConfig, size: tuple[int, int]) -> Any:
    from diffusers import UNet2DConditionModel

    network: Any = UNet2DConditionModel.from_config(dict(unet))
    network.to = lambda **_: network  # another layout is as large, and tensors without contents cannot change theirs
    prepare_unet(network, replace(config.student, compile=False), size)
    return network


def _bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())
