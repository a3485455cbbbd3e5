"""Students: a LoRA, whose teacher is the same U-Net without it, or a full U-Net that also reads guidance.

Both work on any network behind `Network`, `(x_t, t, conditioning, w) -> model output`; `to_network` makes one of a
loaded U-Net or transformer, and a host can give its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcm_core.diffusion.flow_map import EMBEDDING_DIM
from lcm_core.diffusion.guidance import guidance_embedding
from lcm_core.errors import InputError
from lcm_core.families.family import Family
from lcm_core.families.network import FamilyNetwork, build_label_network
from lcm_core.files.checkpoint import Component
from lcm_core.networks.cpu.small_pictures import use_matrix_products
from lcm_core.networks.device import choose_device, choose_dtype
from lcm_core.networks.lora_layers import (
    TARGET_MODULES,
    LoraAdapters,
    Which,
    add_lora,
    checkpoint,
    load_lora_state_dict,
)
from lcm_core.networks.unet import UNet, exact_output, load_unet, set_attention
from lcm_core.pipeline.parts import as_network
from lcm_core.pipeline.sources import ModelSource
from trainer.config import StudentConfig
from trainer.methods.shared import Conditioning, Network, Networks, absent
from trainer.starts import with_guidance

_SMALL_PICTURE = 16 * 16  # positions in the latents up to which plain attention trains faster on a CPU


@dataclass(frozen=True)
class Student:
    """What a distillation runs on."""

    networks: Networks
    trained: nn.Module
    """Holds the trainable parameters."""
    average: nn.Module | None
    """Their moving average under the same names, which is the target and the result; None without."""
    unet: nn.Module
    """The network itself, with its adapters."""
    adapters: LoraAdapters | None = None
    """The adapters of a LoRA; None for a full student."""
    teacher_unet: nn.Module | None = None
    """Where the teacher is a network of its own."""
    critic: nn.Module | None = None
    """Holds the parameters of a critic, which is trained beside the student; None for methods without one."""
    reads_guidance: bool = False
    """Whether the networks take w as an input of their own, the teacher too, which then needs no negative pass."""
    scales_loss: bool = False
    """Whether the loss is scaled up for the backward pass, so that gradients in float16 are not rounded to zero."""

    @property
    def final(self) -> Which:
        """Which adapters are the result."""
        return "online" if self.average is None else "ema"


def choose_precision(device: torch.device, wanted: str, parameters: int, scales_loss: bool = False) -> torch.dtype:
    """Number format of frozen weights and of the computation. Trainable parameters are always float32.

    Args:
        device: where the student is trained.
        wanted: the format, or auto.
        parameters: of the network.
        scales_loss: whether the loss will be scaled up, without which the small gradients of float16 are lost.

    Raises:
        InputError: float16 without that, or an unknown format.
    """
    dtype = choose_dtype(device, None if wanted == "auto" else wanted, parameters)
    if dtype != torch.float16 or scales_loss:
        return dtype
    if wanted == "auto":
        return torch.float32
    raise InputError(f"precision {wanted} overflows in distillation; use bfloat16 or float32")


def unet_network(unet: Any, precision: torch.dtype = torch.float32) -> Network:
    """A diffusers U-Net as `Network`."""
    return to_network(UNet(unet), precision)


def to_network(call: UNet | FamilyNetwork, precision: torch.dtype = torch.float32) -> Network:
    """A loaded network as `Network`. One without a guidance input was made for one w and is not told."""

    def run(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
        extra: dict[str, Any] = {}
        if w is not None and call.guidance_embedding_dim is not None:
            extra["timestep_cond"] = guidance_embedding(w, call.guidance_embedding_dim)
        if w is not None and call.reads_guidance:
            extra["guidance"] = 1 + w
        with torch.autocast(call.device.type, precision, enabled=precision != torch.float32):
            return call(x, t, **conditioning, **extra)

    return run


def lora_student(
    unet: nn.Module,
    network: Network,
    config: StudentConfig,
    with_average: bool = True,
    with_critic: bool = False,
    start: Mapping[str, Tensor] | None = None,
    targets: Sequence[str] = TARGET_MODULES,
    reads_guidance: bool = False,
) -> Student:
    """LoRA on one network, which plays all parts (arXiv 2311.05556): the teacher is it with the adapters off, the
    online student with them on, the target with their average, the critic with adapters of its own.

    Args:
        unet: any network of linear layers and convolutions; it is frozen, and gets adapters.
        network: how to call it.
        config: rank, alpha, layers.
        with_average: whether the target is an average; else it is the online student.
        with_critic: whether there is a critic.
        start: the LoRA to start from, in kohya's layout; None for one that changes nothing yet.
        targets: ends of the names of the layers that get a LoRA, where the settings name none.
        reads_guidance: see `Student`.

    Raises:
        InputError: a rank below 1, no such layers, or a start of another shape.
    """
    adapters = add_lora(unet, config.rank, config.alpha or None, config.target_modules or targets)
    if start is not None:
        load_lora_state_dict(unet, start)
    if with_average:
        adapters.start_ema()
    if with_critic:
        adapters.add_critic()

    def using(which: Which) -> Network:
        def run(x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor | None) -> Tensor:
            with adapters.using(which):
                return network(x, t, conditioning, w)

        return run

    target: Which = "ema" if with_average else "online"
    networks = Networks(using("online"), using(target), using("off"), using("critic"))
    average = _halves(adapters, "ema") if with_average else None
    critic = _halves(adapters, "critic") if with_critic else None
    return Student(networks, _halves(adapters, "online"), average, unet, adapters, None, critic, reads_guidance)


def full_student(
    component: Component,
    teacher: Network | None,
    config: StudentConfig,
    precision: torch.dtype = torch.float32,
    device: torch.device | None = None,
    with_average: bool = True,
    with_critic: bool = False,
    start: Component | None = None,
    source: ModelSource | None = None,
    with_end: bool = False,
    put_on: Callable[[Any], Any] = lambda call: call,
) -> Student:
    """A whole network that starts as the teacher, with a guidance input that at first changes nothing.

    Args:
        component: the teacher's weights and configuration.
        teacher: how to call the teacher; None where the method needs none.
        config: width of the guidance input, checkpointing.
        precision: of the computation; the weights are float32.
        device: where to train.
        with_average: whether the target is an average; else it is the online student.
        with_critic: whether there is a critic; it starts as the teacher and reads guidance too.
        start: the network to start from; None for the teacher.
        source: the teacher's, where it may be of another kind than Stable Diffusion's U-Nets.
        with_end: whether it is also told where a jump ends.
        put_on: puts something around each network that is called.

    Raises:
        InputError: `start` is of another architecture.
    """
    if start is not None:
        check_same_layers(start, component)
    family = None if source is None else source.family
    end = EMBEDDING_DIM if with_end else 0
    online = _trainable(with_guidance(start or component, config.guidance_embedding_dim, end), device, family)
    plain = with_guidance(component, config.guidance_embedding_dim) if with_critic else None
    critic = None if plain is None else _trainable(plain, device, family)
    average = copy.deepcopy(online).requires_grad_(False) if with_average else None

    def ready(network: Any) -> Network:
        return to_network(put_on(UNet(network) if source is None else as_network(source, network)), precision)

    call = ready(online)
    target = call if average is None else ready(average)
    critic_call = absent if critic is None else ready(critic)
    return Student(Networks(call, target, teacher or absent, critic_call), online, average, online, critic=critic)


def check_same_layers(start: Component, teacher: Component) -> None:
    """Refuse to start from a U-Net that is not of the teacher's shape; the guidance input is left aside.

    Raises:
        InputError: names the first difference.
    """
    found, expected = (
        {name: tensor.shape for name, tensor in part.tensors.items() if not name.endswith("cond_proj.weight")}
        for part in (start, teacher)
    )
    if found != expected:
        odd = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise InputError(
            f"{start.source} is of another architecture than the teacher (first difference: '{odd}'); "
            "start from a student of this teacher"
        )


def _trainable(weights: Component, device: torch.device | None, family: Family | None) -> Any:
    """A network in float32, to be trained; in evaluation mode, in which no label is dropped."""
    if family is None:
        network = load_unet(weights, device, torch.float32, torch.contiguous_format)
    else:
        network = build_label_network(family, weights, choose_device(device))
    if hasattr(network, "conv_out"):
        exact_output(network)
    return network.requires_grad_(True)


def prepare_unet(unet: Any, config: StudentConfig, size: tuple[int, int]) -> None:
    """Set a U-Net up for training on latents of this (height, width): layout, attention, checkpointing, compilation."""
    on_cpu = next(unet.parameters()).device.type == "cpu"
    unet.to(memory_format=torch.contiguous_format if on_cpu else torch.channels_last)
    if on_cpu:
        use_matrix_products(unet)
    if hasattr(unet, "set_attn_processor"):
        set_attention(unet, "bmm" if on_cpu and size[0] * size[1] <= _SMALL_PICTURE else "sdpa")
    prepare_network(unet, config)


def prepare_network(unet: Any, config: StudentConfig) -> None:
    """What U-Nets and transformers are set up with alike: checkpointing, compilation."""
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing(checkpoint)
    if config.compile:
        check_compile(config, next(unet.parameters()).device)
        unet.compile()


def check_compile(config: StudentConfig, device: torch.device) -> None:
    """Refuse to compile where that only costs time.

    Raises:
        InputError: says where it pays.
    """
    if config.compile and device.type != "cuda":
        raise InputError(f"compile pays on CUDA only, not on {device}; leave it out")


def trained_parameters(student: Student) -> int:
    """How many trainable parameters the student has."""
    return sum(p.numel() for p in student.trained.parameters() if p.requires_grad)


def _halves(adapters: LoraAdapters, which: Which) -> nn.ModuleDict:
    """The adapters' halves of one kind, under the same names for all kinds."""
    return nn.ModuleDict(
        {path.replace(".", "_"): nn.ModuleList(layer.halves(which)) for path, layer in adapters.layers.items()}
    )
