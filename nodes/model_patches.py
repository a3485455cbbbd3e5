"""What a host's MODEL is, and the sampling that a latent consistency model needs on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_base
import comfy.model_sampling
import torch
from torch import Tensor

from lcm_core.diffusion.diffusion import Diffusion, per_sample, to_x0
from lcm_core.diffusion.process import Process, RectifiedFlow
from lcm_core.errors import InputError
from lcm_core.files.recommended import Recommended

from .attachments import recommended_of
from .guidance import BIAS, Guidance, get_guidance
from .model_sampling import diffusion_of


class LcmSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS, torch.nn.Module):
    """A host's `model_sampling` for latent consistency models: lcm_core's consistency function on the model's schedule.

    The host's schedulers see only the `original_steps` noise levels that distillation knew, so that its "simple" takes
    the timesteps of LCMScheduler; the timesteps themselves are found in the whole schedule, so that any other noise
    level is right too.

    Attributes:
        diffusion: the model's own, with the noise levels that the host's schedulers see.
        boundary: False gives plain x0, as trajectory samplers want it.
    """

    def __init__(self, diffusion: Diffusion) -> None:
        torch.nn.Module.__init__(self)  # not the base class's, which would build a schedule of its own
        process = diffusion.process
        self.diffusion = diffusion
        self.boundary = True
        self.num_timesteps = process.num_train_timesteps
        self.zsnr = process.zero_terminal_snr
        self.sigma_data = 1.0  # the host's name for the signal's spread in x / sqrt(sigma^2 + sigma_data^2)
        known = process.sigmas_at(diffusion.grid(torch.arange(1, diffusion.original_steps + 1)))
        self.register_buffer("sigmas", known.float())
        self.register_buffer("log_sigmas", known.log().float())

    def timestep(self, sigma: Tensor) -> Tensor:
        """Timesteps of noise levels, same shape."""
        return self.diffusion.process.sigma_to_t(sigma)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise levels of timesteps, same shape."""
        return self.diffusion.process.t_to_sigma(timestep.clamp(0, self.num_timesteps - 1))

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        """f(x, sigma), like `model_input`, which is x0 + sigma * eps."""
        a, b = self.diffusion.process.network_scales(per_sample(sigma, model_input))
        x_t = model_input * a
        x0 = to_x0(model_output, x_t, a, b, self.diffusion.prediction_type)
        return self.diffusion.bounded(x0, x_t, self.timestep(sigma).reshape(-1)) if self.boundary else x0

    @contextmanager
    def without_boundary(self) -> Iterator[None]:
        """Let the model, within this context, give plain x0."""
        self.boundary = False
        try:
            yield
        finally:
            self.boundary = True


@dataclass(frozen=True)
class Facts:
    """What was found out about a MODEL."""

    family: str
    diffusion: Diffusion
    guidance: Guidance | None
    lora_layers: int
    recommended: Recommended = field(default_factory=Recommended)
    """How its file wants to be sampled, where that was loaded by a node of ours."""

    @property
    def guidance_scale(self) -> float:
        """What to use where the user says nothing."""
        return 1.0 if self.guidance is None else self.guidance.default_scale

    def describe(self) -> str:
        """A sentence for the user."""
        return self._describe() + (f"; made for {self.recommended}" if self.recommended.is_distilled else "")

    def _describe(self) -> str:
        kind, process = f"{self.family}, {self.diffusion.prediction_type.replace('_', '-')}", self.diffusion.process
        if isinstance(process, RectifiedFlow):
            kind += f" with shift {process.shift:.4g}"
        elif process.zero_terminal_snr:
            kind += ", zero terminal SNR"
        if self.guidance is not None:
            return f"full LCM ({kind}): guidance goes into the network, the negative prompt is not used"
        if self.lora_layers:
            return f"model with LoRA on {self.lora_layers} layers ({kind}): guidance 1 to 2"
        return f"plain model ({kind}), no LoRA found: few steps need an LCM-LoRA or a distilled model"


def inspect_model(model: Any) -> Facts:
    """Find out what a MODEL is.

    Raises:
        InputError: it adds noise in a way that LCM does not know.
    """
    diffusion = _find_diffusion(model)  # first: it refuses MODELs of other kinds
    return Facts(
        family=_family(model),
        diffusion=diffusion,
        guidance=get_guidance(model),
        lora_layers=sum(key != BIAS for key in model.patches),
        recommended=recommended_of(model),
    )


def with_sampling(model: Any, facts: Facts, original_steps: int = 50) -> Any:
    """A clone of the MODEL that samples as a latent consistency model.

    A flow model does so by itself: its consistency function is plain x0, which its own `model_sampling` gives.
    """
    clone = model.clone()
    if isinstance(facts.diffusion.process, RectifiedFlow):
        return clone
    clone.add_object_patch("model_sampling", LcmSampling(replace(facts.diffusion, original_steps=original_steps)))
    return clone


def process_of(sampling: Any) -> Process:
    """The noise process of a host's `model_sampling`.

    Raises:
        InputError: one that LCM does not know, or that knows only some of the model's noise levels.
    """
    if isinstance(sampling, LcmSampling):
        return sampling.diffusion.process
    if is_stock_lcm(sampling):
        raise InputError("the MODEL comes from ModelSamplingDiscrete (lcm); use LCM Apply in its place")
    return diffusion_of(sampling).process


def is_stock_lcm(sampling: Any) -> bool:
    """Whether a host's `model_sampling` is that of its own ModelSamplingDiscrete (lcm), which keeps every 20th level of
    noise and takes each network for one that predicts epsilon."""
    if isinstance(sampling, LcmSampling) or getattr(sampling, "sigmas", None) is None:
        return False
    return len(sampling.sigmas) < getattr(sampling, "num_timesteps", 0)


def check_prediction(base: Any) -> None:
    """Refuse a MODEL whose output its own `model_sampling` misreads.

    Args:
        base: the host's model, without its patcher.

    Raises:
        InputError: a v model behind the stock node for LCM.
    """
    if is_stock_lcm(base.model_sampling) and base.model_type.name == "V_PREDICTION":
        raise InputError(
            "the MODEL predicts v, but ModelSamplingDiscrete (lcm) reads it as epsilon; use LCM Apply in its place"
        )


def is_unet(model: Any) -> bool:
    """Whether a MODEL is a U-Net of Stable Diffusion: by its sizes, which the host read from its weights.

    Some transformers (Anima) count `model_channels` too; but every transformer is named there.
    """
    sizes = model.model.model_config.unet_config
    return "model_channels" in sizes and "image_model" not in sizes


def _find_diffusion(model: Any) -> Diffusion:
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, LcmSampling):
        return sampling.diffusion
    if is_stock_lcm(sampling):  # what the model was before that node
        sampling = comfy.model_base.model_sampling(model.model.model_config, model.model.model_type)
    return diffusion_of(sampling)


def _family(model: Any) -> str:
    """The U-Nets by their text encoders' width; for all others the host's own name."""
    if not is_unet(model):
        return type(model.model.model_config).__name__
    width = model.model.model_config.unet_config.get("context_dim")
    return {1024: "SD 2.x", 1280: "SDXL", 2048: "SDXL"}.get(width, "SD 1.x")
