"""What the LCM Distiller learns from: latents of the host with its conditioning, or a folder of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.pipeline.image import load_image
from trainer.data.sources import read_source
from trainer.distill import Latents

from .model_sampling import noise_scale_of
from .network import PROMPT
from .sampling import read_latent

Tell = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Latents, and the prompts that their conditioning names by number."""

    latents: Latents
    """The latents, in the scale of the network's own noise; `conditioning` and `null_conditioning` are numbers of
    `prompts`."""
    prompts: list[Any]
    """The host's conditioning; the last entry is the empty prompt."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one latent, (1, C, ...)."""
        return (1, *self.latents.latents.shape[1:])

    @property
    def tensors(self) -> list[Tensor]:
        """All that the prompts hold, in order."""
        return [self.latents.conditioning[PROMPT], *_tensors(self.prompts)]


def from_latents(model: Any, latents: dict[str, Any], positive: list[Any], negative: list[Any]) -> TrainingData:
    """Training data of a LATENT, and one prompt for all or one for each.

    Raises:
        InputError: prompts and latents do not pair up, or the latents are not the model's.
    """
    x0 = read_latent(model, latents)["samples"]
    if len(positive) not in (1, len(x0)):
        raise InputError(
            f"{len(positive)} prompts and {len(x0)} latents do not pair up; connect one prompt, or one for each latent"
        )
    scale = noise_scale_of(model.get_model_object("model_sampling"))
    rows = torch.arange(len(x0)) % len(positive)
    scaled = model.model.process_latent_in(x0).float().clone() / scale
    data = Latents(scaled, {PROMPT: rows}, {PROMPT: torch.tensor([len(positive)])})
    return TrainingData(data, [*positive, negative[0]])


def from_folder(model: Any, clip: Any, vae: Any, folder: Path, side: int, tell: Tell) -> TrainingData:
    """Training data of a folder of pictures with captions, cut to squares of `side` pixels; see `trainer.data.sources`.

    Raises:
        InputError: no pictures there.
    """
    found, latents = [], []
    items = read_source(folder).items
    for number, item in enumerate(items, 1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        tell(f"encoding picture {number} of {len(items)}")
        try:
            picture = load_image(item.open(), (side, side))  # (1, 3, H, W) in [-1, 1]
        except InputError as error:
            tell(f"skipped {error}")
            continue
        latents.append(vae.encode((picture.movedim(1, -1) + 1) / 2).cpu())
        found.append(item.caption)
    if not latents:
        raise InputError(f"none of the {len(items)} pictures in {folder} could be read; convert them to .png")
    return from_latents(model, {"samples": torch.cat(latents)}, encode_prompts(clip, found), encode_prompts(clip, [""]))


def encode_prompts(clip: Any, prompts: Iterable[str]) -> list[Any]:
    """The host's conditioning of several prompts, one entry for each; a prompt that comes again is encoded once."""
    prompts = list(prompts)
    known = {prompt: clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in dict.fromkeys(prompts)}
    return [entry for prompt in prompts for entry in known[prompt]]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
