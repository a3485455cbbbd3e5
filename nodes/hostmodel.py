"""What a host's MODEL is, and the two things that a latent consistency model needs on it: its sampling and guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid5

import comfy.model_sampling
import torch
from torch import Tensor

from lcm_core.diffusion.consistency import consistency_function, to_x0
from lcm_core.diffusion.guidance import guidance_bias
from lcm_core.diffusion.schedule import NoiseSchedule, abar_from_sigma, get_timesteps_lcm
from lcm_core.errors import InputError
from lcm_core.files.recommended import Stated

PAPER_GUIDANCE = 8.0
"""Of the tables in arXiv 2310.04378: what a full LCM takes when its file does not say."""
_GUIDANCE, _STATED = "lcm_suite.guidance", "lcm_suite.stated"  # what travels with a MODEL through all its clones
_BIAS = "diffusion_model.time_embed.0.bias"


class LcmSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS, torch.nn.Module):
    """A host's `model_sampling` for latent consistency models: lcm_core's consistency function on the model's schedule.

    The host's schedulers see only the `original_steps` noise levels that distillation knew, so that its "simple" takes
    the timesteps of LCMScheduler; the timesteps themselves are found in the whole schedule, so that any other noise
    level is right too.

    Attributes:
        schedule: all noise levels of the model.
        prediction_type: what its network predicts.
        boundary: False gives plain x0, as trajectory samplers want it.
    """

    def __init__(self, schedule: NoiseSchedule, prediction_type: str, original_steps: int = 50) -> None:
        torch.nn.Module.__init__(self)  # not the base class's, which would build a schedule of its own
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.boundary = True
        self.num_timesteps = schedule.num_train_timesteps
        self.zsnr = schedule.zero_terminal_snr
        self.sigma_data = 1.0  # the host's name for the signal's spread in x / sqrt(sigma^2 + sigma_data^2)
        grid = get_timesteps_lcm(original_steps, original_steps, num_train_timesteps=self.num_timesteps)
        known = schedule.sigmas[grid.flip(0)]
        self.register_buffer("sigmas", known.float())
        self.register_buffer("log_sigmas", known.log().float())

    def timestep(self, sigma: Tensor) -> Tensor:
        """Timesteps of noise levels, same shape."""
        return self.schedule.sigma_to_t(sigma)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Noise levels of timesteps, same shape."""
        return self.schedule.t_to_sigma(timestep.clamp(0, self.num_timesteps - 1))

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        """f(x, sigma), like `model_input`, which is x0 + sigma * eps."""
        abar = abar_from_sigma(sigma.reshape(-1, *[1] * (model_input.ndim - 1)))
        x_t = model_input * abar.sqrt()
        if not self.boundary:
            return to_x0(model_output, x_t, abar, self.prediction_type)
        return consistency_function(model_output, x_t, self.timestep(sigma).reshape(-1), abar, self.prediction_type)

    @contextmanager
    def without_boundary(self) -> Iterator[None]:
        """Within this context the model gives plain x0."""
        self.boundary = False
        try:
            yield
        finally:
            self.boundary = True


@dataclass(frozen=True, eq=False)
class Guidance:
    """How a full LCM takes guidance.

    The host's U-Net has no place for `cond_proj`, but for one guidance scale it is a shift of the first time layer's
    bias; see `lcm_core.diffusion.guidance.guidance_bias`.
    """

    cond_proj: Tensor  # (C, D)
    linear_1: Tensor  # (E, C): the first time layer's weight as loaded, before any LoRA
    default_scale: float = PAPER_GUIDANCE
    shift: Tensor | None = None  # (E,): what has been added to the bias by now

    def shift_for(self, guidance_scale: float) -> Tensor:
        """What a guidance scale adds to the bias, (E,)."""
        return guidance_bias(guidance_scale, self.cond_proj, self.linear_1)


@dataclass(frozen=True)
class Facts:
    """What was found out about a MODEL."""

    family: str
    prediction_type: str
    schedule: NoiseSchedule
    guidance: Guidance | None
    lora_layers: int
    stated: Stated | None = None
    """How its file wants to be sampled, where that was loaded by a node of ours."""

    @property
    def guidance_scale(self) -> float:
        """What to use where the user says nothing."""
        return 1.0 if self.guidance is None else self.guidance.default_scale

    def describe(self) -> str:
        """A sentence for the user."""
        return self._describe() + ("" if self.stated is None else f"; made for {self.stated}")

    def _describe(self) -> str:
        kind = f"{self.family}, {self.prediction_type.replace('_', '-')}"
        if self.schedule.zero_terminal_snr:
            kind += ", zero terminal SNR"
        if self.guidance is not None:
            return f"full LCM ({kind}): guidance goes into the network, the negative prompt is not used"
        if self.lora_layers:
            return f"model with LoRA on {self.lora_layers} layers ({kind}): guidance 1 to 2"
        return f"plain model ({kind}), no LoRA found: few steps need an LCM-LoRA or a distilled model"


def inspect_model(model: Any) -> Facts:
    """Find out what a MODEL is.

    Raises:
        InputError: not a Stable Diffusion 1.x, 2.x or SDXL model.
    """
    prediction_type, schedule = _find_schedule(model)
    return Facts(
        family=_family(model),
        prediction_type=prediction_type,
        schedule=schedule,
        guidance=get_guidance(model),
        lora_layers=sum(key != _BIAS for key in model.patches),
        stated=getattr(model, "attachments", {}).get(_STATED),
    )


def with_sampling(model: Any, facts: Facts, original_steps: int = 50) -> Any:
    """A clone of the MODEL that samples as a latent consistency model."""
    clone = model.clone()
    clone.add_object_patch("model_sampling", LcmSampling(facts.schedule, facts.prediction_type, original_steps))
    return clone


def get_guidance(model: Any) -> Guidance | None:
    """How the MODEL takes guidance, if it is a full LCM that was loaded with its `cond_proj`."""
    return getattr(model, "attachments", {}).get(_GUIDANCE)


def attach_guidance(model: Any, guidance: Guidance) -> None:
    """Make a MODEL known as a full LCM."""
    model.set_attachments(_GUIDANCE, guidance)


def attach_stated(model: Any, stated: Stated | None) -> None:
    """Let a MODEL know how its file, or that of its LoRA, wants to be sampled; None leaves what it knew."""
    if stated is not None:
        model.set_attachments(_STATED, stated)


def with_guidance(model: Any, guidance_scale: float) -> Any:
    """A clone of a full LCM that follows this guidance scale, in place of any before."""
    guidance = get_guidance(model)
    if guidance is None:
        raise InputError("this MODEL has no guidance embedding; load a full LCM with the LCM Checkpoint Loader")
    shift = guidance.shift_for(guidance_scale)
    change = shift if guidance.shift is None else shift - guidance.shift
    clone = model.clone()
    clone.add_patches({_BIAS: ("diff", (change,))})
    # Equal weights are to be known as such: else the host would load them again for every picture.
    clone.patches_uuid = uuid5(model.patches_uuid, repr(guidance_scale))
    attach_guidance(clone, replace(guidance, shift=shift))
    return clone


def schedule_of(sampling: Any) -> NoiseSchedule:
    """The noise schedule of a host's `model_sampling`.

    Raises:
        InputError: it knows only some of the model's noise levels.
    """
    if isinstance(sampling, LcmSampling):
        return sampling.schedule
    if len(sampling.sigmas) < getattr(sampling, "num_timesteps", 0):
        raise InputError("the MODEL comes from ModelSamplingDiscrete (lcm); use LCM Apply in its place")
    return NoiseSchedule(abar_from_sigma(sampling.sigmas.cpu().double()))


def _find_schedule(model: Any) -> tuple[str, NoiseSchedule]:
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, LcmSampling):
        return sampling.prediction_type, sampling.schedule
    kind = model.model.model_type.name
    discrete = comfy.model_sampling.ModelSamplingDiscrete
    if kind not in ("EPS", "V_PREDICTION") or not isinstance(sampling, discrete):
        raise InputError(f"this MODEL ({kind}) is no Stable Diffusion 1.x, 2.x or SDXL model; LCM needs one of these")
    if len(sampling.sigmas) < sampling.num_timesteps:  # of the stock node's "lcm", which keeps every 20th level
        sampling = discrete(model.model.model_config, zsnr=sampling.zsnr)
        return ("v_prediction" if kind == "V_PREDICTION" else "epsilon"), schedule_of(sampling)
    return _prediction_type(sampling), schedule_of(sampling)


def _prediction_type(sampling: Any) -> str:
    if isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        return "v_prediction"
    return "sample" if isinstance(sampling, comfy.model_sampling.X0) else "epsilon"


def _family(model: Any) -> str:
    width = model.model.model_config.unet_config.get("context_dim")
    return {1024: "SD 2.x", 1280: "SDXL", 2048: "SDXL"}.get(width, "SD 1.x")
