"""A family's network and its text encoders, as the pipeline and the trainer call those of all models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.families.family import Family, Scheduler
from lcm_core.families.guidance_input import add_guidance_input
from lcm_core.families.loading import find_class, load_network, load_text_pipeline
from lcm_core.files.checkpoint import Component, read_component
from lcm_core.networks.conditioning import stack_rows
from lcm_core.networks.device import assemble
from lcm_core.networks.inversions import named
from lcm_core.networks.prompt import parse_weights
from lcm_core.networks.text_encoder import CACHED_PROMPTS
from lcm_core.networks.unet import exact_output


class FamilyNetwork:
    """A diffusers network as `network(x, t, **conditioning) -> Tensor`; casts what goes in and what comes out.

    Attributes:
        model: the network.
        family: how it is called.
        scheduler: what its folder states of noise levels.
        reads_guidance: whether guidance is an input of its own, `guidance` (B,), instead of a negative pass.
        guidance_embedding_dim: width of the guidance embedding that a full LCM takes as `timestep_cond`; else None.
        end_embedding_dim: 0, for none is a flow map yet.
    """

    def __init__(self, model: Any, family: Family, scheduler: Scheduler) -> None:
        parameter = next(model.parameters())
        self.model, self.family, self.scheduler = model, family, scheduler
        self.device, self.dtype = parameter.device, parameter.dtype
        self.reads_guidance = bool(model.config.get("guidance_embeds"))
        self.guidance_embedding_dim: int | None = model.config.get("time_cond_proj_dim")
        self.end_embedding_dim = 0

    @property
    def multiple(self) -> int:
        """Latent pixels that the sides of its input must be multiples of."""
        return self.family.multiple(self.model.config)

    @property
    def sample_size(self) -> int:
        """Latent pixels along each side that it was trained at."""
        return int(self.model.config.get("sample_size") or self.family.sample_size)

    @property
    def terminal(self) -> float | None:
        """Where its own sampler's last step begins, if it says so."""
        stated = self.scheduler.get("shift_terminal")
        return float(stated) if isinstance(stated, (int, float)) and 0 < stated < 1 else None

    def shift(self, shape: Sequence[int], steps: int) -> float:
        """The shift of noise levels for latents of this shape (C, ..., h, w), sampled in so many steps."""
        tokens = torch.Size(shape[1:]).numel() // self.family.patch**2
        return self.family.shift(self.scheduler, tokens, steps)

    def __call__(self, x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        """What it predicts, (B, C, ...) in the dtype of `x`, at timesteps t (B,) in 0 .. 1000."""
        cast = {name: self._cast(value) for name, value in conditioning.items()}
        output = self.family.predict(self.model, self._cast(x), t.to(self.device), **cast)
        return output.to(x.device, x.dtype)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


class TransformerText:
    """A family's text encoders, loaded when the first prompt is asked for.

    Attributes:
        encoders: none that a LoRA could be merged into.
    """

    encoders: Sequence[Any] = ()

    def __init__(self, family: Family, root: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.family, self.root, self.device, self.dtype = family, root, device, dtype
        self._pipe: Any = None
        self._encode_cached = lru_cache(CACHED_PROMPTS)(self._encode)

    def encode(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, weighted: bool = False
    ) -> dict[str, Tensor]:
        """Conditioning of prompts, tensors (B, ...); `size` makes no difference to these families.

        Raises:
            InputError: `weighted`, and a prompt has weights, which language models know nothing of.
        """
        return stack_rows([self._encode_cached(_unweighted(prompt) if weighted else prompt) for prompt in prompts])

    def clear_cache(self) -> None:
        """Forget encoded prompts."""
        self._encode_cached.cache_clear()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _encode(self, prompt: str) -> dict[str, Tensor]:
        assert self.family.encode is not None
        if self._pipe is None:
            encoders = dict(self.family.text_encoders)
            self._pipe = load_text_pipeline(self.family.pipeline, encoders, self.root, self.device, self.dtype)
        batch = self.family.encode(self._pipe, [prompt])
        return {name: _wide(value[0]).to(self.device) for name, value in batch.items()}


def _unweighted(prompt: str) -> str:
    text = named(prompt, {})
    segments = parse_weights(text)
    if any(weight != 1 for _, weight in segments):
        marked = next(words.strip() for words, weight in segments if weight != 1)
        raise InputError(
            f"the prompt has weights or BREAK (at {marked[:40]!r}), which this model's text encoder cannot read; "
            "write \\( and \\) for brackets, or leave them out"
        )
    return "".join(words for words, _ in segments)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def load_family_network(
    family: Family, folder: Path, scheduler: Scheduler, device: torch.device, dtype: torch.dtype
) -> FamilyNetwork:
    """The network in its own folder.

    Raises:
        InputError: it is missing or broken.
    """
    if family.count_labels is None:
        model = load_network(family.network, folder, device, dtype)
    else:
        model = build_label_network(family, read_component(folder, "unet"), device, dtype)
    return FamilyNetwork(model, family, scheduler)


def build_label_network(
    family: Family, component: Component, device: torch.device, dtype: torch.dtype = torch.float32
) -> Any:
    """A class-conditional network with a component's weights, frozen and in evaluation mode.

    Raises:
        InputError: weights and configuration do not belong together.
    """
    config = {name: value for name, value in component.config.items() if not name.startswith("_")}
    kind: Any = find_class("diffusers", family.network)
    width = None if family.network == "UNet2DConditionModel" else config.pop("time_cond_proj_dim", None)

    def build() -> Any:
        model = kind.from_config(config)
        if width is not None:
            add_guidance_input(model, width)
        return model

    model = assemble(build, component, device, dtype, torch.contiguous_format)
    if family.complete is not None:
        family.complete(model)
    if hasattr(model, "conv_out") and dtype != torch.float32:
        exact_output(model)
    return model
