"""What sets one family of models apart from another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcm_core.errors import InputError

if TYPE_CHECKING:
    from lcm_core.networks.vae import VAE

_MOST_SHIFT = 100.0
Scheduler = Mapping[str, Any]
"""Content of a model's scheduler_config.json."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The attention layers of blocks that attend to picture and text with weights of their own for each."""


def scheduled_shift(scheduler: Scheduler, tokens: int, steps: int) -> float:
    """The shift of noise levels that a scheduler states for pictures of so many tokens (`RectifiedFlow.shift`).

    A dynamic one is e^mu, or mu, with mu on a straight line through (base_image_seq_len, base_shift) and
    (max_image_seq_len, max_shift) (arXiv 2403.03206 Sec. 5.3.2). `steps` counts for some families alone.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return _usable(_number(scheduler, "flow_shift", _number(scheduler, "shift", 1.0)))
    low, high = _number(scheduler, "base_image_seq_len", 256), _number(scheduler, "max_image_seq_len", 4096)
    base, most = _number(scheduler, "base_shift", 0.5), _number(scheduler, "max_shift", 1.15)
    mu = base + (most - base) * (tokens - low) / ((high - low) or math.nan)
    return _usable(mu if scheduler.get("time_shift_type") == "linear" else math.exp(min(mu, _MOST_SHIFT)))


def _usable(shift: float) -> float:
    if not 0 < shift <= _MOST_SHIFT:
        raise InputError(f"the model's scheduler states a shift of {shift:g}; it must be above 0, get the model again")
    return shift


def _number(scheduler: Scheduler, name: str, default: float) -> float:
    value = scheduler.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"the model's scheduler states {name} {value!r:.60}, which is no number; get the model again")
    return float(value)


@dataclass(frozen=True)
class Family:
    """One family; each has a file of its own beside this one."""

    name: str
    """The name that `ModelInfo.family` and messages have."""
    pipeline: str
    """diffusers' class, as model_index.json names it."""
    network: str
    """diffusers' class of the network."""
    predict: Callable[..., Tensor]
    """(network, x (B, C, ...), t (B,) in 0 .. 1000, **conditioning) -> what it was trained to predict, like x: of a
    flow the velocity eps - x0."""
    load_vae: Callable[[Path, torch.device, torch.dtype | None], VAE]
    """(folder of the VAE, device, number format) -> a VAE whose latents are what `predict` takes."""
    latents: Callable[[Mapping[str, Any]], tuple[int, int]]
    """Configuration of the VAE -> (channels of the latents, pixels per latent pixel along one side)."""
    lora_targets: tuple[str, ...]
    """Ends of the names of the layers that get a LoRA."""
    text_encoders: Mapping[str, str] = field(default_factory=dict)
    """Folder of each text encoder -> transformers' class; a tokenizer lies beside each."""
    encode: Callable[[Any, list[str]], dict[str, Tensor]] | None = None
    """(diffusers' pipeline with text encoders alone, prompts) -> conditioning, tensors (B, ...)."""
    count_labels: Callable[[Mapping[str, Any]], tuple[int, int]] | None = None
    """A function of a class-conditional family: configuration of the network -> (classes, labels in all), where nothing
    names the classes. A label behind those of the classes stands for none of them. None for families that read text."""
    is_square: bool = False
    """Whether it paints squares alone."""
    is_flow: bool = True
    """Whether its noise is a flow's; else it is what the scheduler states."""
    folder: str = "transformer"
    """Where the network lies in a diffusers folder."""
    complete: Callable[[Any], None] | None = None
    """Gives a network that was built without memory what its weights' files do not hold."""
    patch: int = 2
    """Latent pixels along each side of what the network takes for one token."""
    sample_size: int = 128
    """Latent pixels along each side that it was trained at, where its configuration does not say."""
    steps: int = 28
    """The usual number of steps of its own sampler."""
    guidance_scale: float = 4.0
    """The guidance scale that a plain model is used with."""
    is_video: bool = False
    """Whether latents are (B, C, frames, h, w)."""
    shift: Callable[[Scheduler, int, int], float] = scheduled_shift
    """(scheduler, tokens of a picture, steps) -> the shift of noise levels."""
    lora_names: Mapping[str, str] = field(default_factory=dict)
    """Parts of diffusers' names -> of those that LoRA files and ComfyUI have; empty where they are the same."""

    def multiple(self, config: Mapping[str, Any]) -> int:
        """Latent pixels that the sides of a picture must be multiples of, by the network's configuration: each level of
        a U-Net halves evenly, a transformer takes whole patches."""
        levels = config.get("block_out_channels")
        return self.patch if levels is None else int(2 ** (len(levels) - 1))
