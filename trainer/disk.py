"""How much disk a run takes: its cache, its state and its result, without loading a network."""

from __future__ import annotations

from lcm_core.files.checkpoint import Component, list_components, read_component
from lcm_core.pipeline.sources import ModelSource
from trainer.config import DistillConfig
from trainer.data.teacher import Teacher
from trainer.methods.method import get_method

TOKENS = 77
"""Tokens of a prompt."""


def cache_size(teacher: Teacher, pictures: int, captions: int, side: int, has_hints: bool = False) -> int:
    """Latents and text embeddings in float16, with one of these for the empty prompt, and control pictures."""
    width = teacher_width = 0
    latents = pictures * teacher.latent_channels * side**2 * 2
    latents += pictures * 3 * (side * teacher.scale) ** 2 if has_hints else 0
    if teacher.source.family is not None:  # how long texts are is known to their encoders alone
        return latents
    for name in encoders(teacher.source):
        config = read_component(teacher.source.text, name).config
        width += config["hidden_size"]
        teacher_width = config["projection_dim"] if name.endswith("_2") else 0
    return latents + (captions + 1) * (TOKENS * width + teacher_width) * 2


def state_size(config: DistillConfig, trained: int, head: int = 0) -> int:
    """Weights, their average, two moments, and five numbers for each step; twice, for the state before is kept too.

    Args:
        config: the run's settings.
        trained: numbers in the student.
        head: and in its critic's head.
    """
    average = 4 * trained if config.training.ema_decay > 0 else 0
    moments = 2 if config.training.optimizer == "adamw8bit" else 8
    weights = trained * trained_networks(config) + head
    return 2 * (weights * (4 + moments) + average + config.training.steps * 5 * 8)


def trained_networks(config: DistillConfig) -> int:
    """How many networks of the student's size are trained: it, and its critic where the method has one."""
    return 2 if get_method(config.method).needs_critic else 1


def result_size(config: DistillConfig, source: ModelSource, unet: Component, trained: int) -> int:
    """A LoRA in float16; or the whole model, twice: as a folder and as one file."""
    if config.student.kind == "lora":
        return 2 * trained
    if source.family is not None:  # as a folder alone
        return 2 * trained + sum(tensor.nbytes for tensor in read_component(source.vae, "vae").tensors.values())
    others = [read_component(source.vae, "vae"), *(read_component(source.text, name) for name in encoders(source))]
    stored = sum(tensor.nbytes for part in others for tensor in part.tensors.values())
    return 2 * (2 * trained + stored)


def encoders(source: ModelSource) -> list[str]:
    """Names of a model's text encoders."""
    names = [name for name in list_components(source.text) if name.startswith("text_encoder")]
    return names or ["text_encoder"]


def count_weights(component: Component) -> int:
    """Numbers in a network."""
    return sum(tensor.numel() for tensor in component.tensors.values())
