"""The work behind the pipeline: from conditioning and noise, through one or two runs of a sampler, to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lcm_core.diffusion.consistency import ConsistencyDenoiser, Denoiser
from lcm_core.diffusion.flow_map import check_sampler, told_ends
from lcm_core.diffusion.grids import get_sigmas_lcm, get_sigmas_trailing
from lcm_core.diffusion.interpolation import interpolate, travel_noise_sampler
from lcm_core.diffusion.process import Process
from lcm_core.diffusion.samplers import (
    Callback,
    NoiseSampler,
    initial_latents,
    initial_noise,
    inpaint,
    sample_dpm_2m,
    sample_dpmpp_2m,
    sample_euler,
    sample_lcm,
    sample_tcd,
    seeded_noise_sampler,
)
from lcm_core.errors import InputError
from lcm_core.files.recommended import FEW_STEP_SAMPLERS
from lcm_core.networks.prompt import split_parts
from lcm_core.pipeline.guides import Guides, Passes, attend_in_steps, guided_network, open_guides
from lcm_core.pipeline.image import load_image, load_mask, to_pil
from lcm_core.pipeline.model import Conditioning, Model
from lcm_core.pipeline.prompts import StepSource, encode_prompts, guided_by_steps, mix_sources, steps_of
from lcm_core.pipeline.settings import Settings, check_size

NoiseSource = Callable[[Sequence[int]], tuple[Tensor, NoiseSampler]]
"""A function from a shape (C, h, w) to the first noise (B, C, h, w) and the sampler of all later noise."""

_SAMPLERS = {
    "lcm": sample_lcm,
    "tcd": sample_tcd,
    "euler": sample_euler,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpm_2m": sample_dpm_2m,
}


class Stopped(Exception):
    """A callback asked to paint no further."""


@dataclass(frozen=True)
class Inputs:
    """What the pictures of one batch are made from. Conditioning that stays the same may be given as it is."""

    cond: StepSource | Conditioning
    uncond: StepSource | Conditioning | None
    noise: NoiseSource
    x0: Tensor | None = None  # (1 or B, C, h, w) latents of the input image
    pixels: Tensor | None = None  # (1, 3, H, W) the input image itself, where a mask keeps some of it
    mask: Tensor | None = None  # (1, 1, H, W), 1 where to paint
    guides: Guides = field(default_factory=Guides)
    avoided: StepSource | Conditioning | None = None  # the negative prompt, where `guides.nag` is on


class Pass(NamedTuple):
    """One run of the sampler."""

    shape: tuple[int, ...]  # of the latents: C, h, w, or C, frames, h, w
    process: Process
    sigmas: Tensor  # (N + 1,)


def plan_passes(model: Model, settings: Settings) -> list[Pass]:
    """The runs that `settings` ask for: one, or two with `upscale`.

    Raises:
        InputError: a size that this model cannot hold, or more steps than the strength leaves.
    """
    multiple = model.size_multiple
    sizes = [(settings.width, settings.height, settings.strength)]
    if settings.upscale > 1:
        width, height = (round(side * settings.upscale / multiple) * multiple for side in sizes[0][:2])
        sizes.append((width, height, settings.upscale_strength))
    passes = []
    for width, height, strength in sizes:
        check_size(width, height, multiple)
        shape = model.latent_shape(width, height)
        process = model.process_for(shape, settings.num_inference_steps, settings.shift)
        passes.append(Pass(shape, process, _sigmas(model, process, settings, strength)))
    return passes


def _sigmas(model: Model, process: Process, settings: Settings, strength: float) -> Tensor:
    steps = settings.num_inference_steps
    if settings.timesteps is not None or settings.sampler in FEW_STEP_SAMPLERS:
        return get_sigmas_lcm(process, steps, settings.original_steps, strength, settings.timesteps)
    return get_sigmas_trailing(process, steps, strength, model.terminal)


def noise_source(seeds: Sequence[int], device: torch.device) -> NoiseSource:
    """All noise of a batch, each picture's from its own seed."""

    def source(shape: Sequence[int]) -> tuple[Tensor, NoiseSampler]:
        return initial_noise(seeds, shape, device), seeded_noise_sampler(seeds, shape, device)

    return source


def mix_inputs(a: Inputs, b: Inputs, fraction: float, mode: str) -> Inputs:
    """Everything that makes a picture, `fraction` of the way from `a` to `b`; 0 and 1 give them bit for bit."""

    def source(shape: Sequence[int]) -> tuple[Tensor, NoiseSampler]:
        (noise_a, later_a), (noise_b, later_b) = a.noise(shape), b.noise(shape)
        return interpolate(noise_a, noise_b, fraction, mode), travel_noise_sampler(later_a, later_b, fraction, mode)

    def mixed(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        return None if first is None or second is None else interpolate(first, second, fraction, mode)

    def mixed_steps(first: StepSource | Conditioning, second: StepSource | Conditioning) -> StepSource:
        return mix_sources(steps_of(first), steps_of(second), fraction, mode)

    def mixed_if(first: StepSource | Conditioning | None, second: StepSource | Conditioning | None) -> Any:
        return None if first is None or second is None else mixed_steps(first, second)

    return Inputs(
        cond=mixed_steps(a.cond, b.cond),
        uncond=mixed_if(a.uncond, b.uncond),
        noise=source,
        x0=mixed(a.x0, b.x0),
        guides=a.guides,
        avoided=mixed_if(a.avoided, b.avoided),
    )


def make_inputs(
    model: Model,
    pictures: Sequence[Settings],
    image: Any = None,
    mask: Any = None,
    control: Sequence[tuple[str, Any, float]] = (),
) -> Inputs:
    """Encode all that a batch is made from.

    Args:
        model: that will paint it.
        pictures: one for each picture; they differ in prompt and seed alone.
        image, mask, control: see `Pipeline.__call__`.

    Raises:
        InputError: a picture or control that cannot be used.
    """
    first = pictures[0]
    size, syntax = (first.width, first.height), first.prompt_syntax
    prompts = [picture.prompt for picture in pictures]
    cond = encode_prompts(model, prompts, size, syntax)
    if first.blend:
        second = encode_prompts(model, [first.second_prompt] * len(pictures), size, syntax)
        cond = mix_sources(cond, second, first.blend, "slerp")
    joins = syntax != "plain" and any(len(split_parts(prompt)) > 1 for prompt in (*prompts, first.second_prompt))
    has_negative_pass = model.guidance_embedding_dim is None and (first.guidance_scale != 1 or joins)
    guides = open_guides(model, first, control)
    negative = None
    if has_negative_pass or guides.nag.is_on:
        negative = encode_prompts(model, [first.negative_prompt] * len(pictures), size, syntax, joined=False)
    pixels = None if image is None else load_image(image, size).to(model.device)
    return Inputs(
        cond=cond,
        uncond=negative if has_negative_pass else None,
        noise=noise_source([picture.seed for picture in pictures], model.device),
        x0=None if pixels is None else model.vae.encode(pixels),
        pixels=pixels,
        mask=None if mask is None else load_mask(mask, size).to(model.device),
        guides=guides,
        avoided=negative if guides.nag.is_on else None,
    )


@torch.inference_mode()
def paint(model: Model, inputs: Inputs, settings: Settings, callback: Callback | None = None) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1].

    Raises:
        InputError: the network gave NaN or infinity.
        Stopped: the callback returned False.
    """
    latents = paint_latents(model, inputs, settings, callback)
    images = model.vae.decode(latents)
    _check_finite(images, model)
    if inputs.mask is not None and inputs.pixels is not None:
        # Coding and decoding blurs; what was to be kept is taken from the original.
        images = torch.lerp(inputs.pixels, images, inputs.mask)
    return images


@torch.inference_mode()
def paint_latents(model: Model, inputs: Inputs, settings: Settings, callback: Callback | None = None) -> Tensor:
    """The latents (B, C, h, w) of pictures; errors as of `paint`."""
    first, *second = plan_passes(model, settings)
    noise, later_noise = inputs.noise(first.shape)
    latents = _sample(model, inputs, settings, first, noise, later_noise, inputs.x0, callback)
    earlier = len(first.sigmas) - 1
    for run in second:
        x0 = _resized(latents, run.shape, "bicubic")
        _, later_noise = inputs.noise(run.shape)
        # The first draw is the first pass's noise in another shape; the next one is fresh.
        noise = later_noise(run.sigmas[:1], run.sigmas[:1])
        latents = _sample(model, inputs, settings, run, noise, later_noise, x0, callback, earlier)
    _check_finite(latents, model)
    return latents


def _resized(latents: Tensor, shape: Sequence[int], mode: str) -> Tensor:
    """Latents (B, C, h, w), or of one frame (B, C, 1, h, w), at another size."""
    flat = functional.interpolate(latents.flatten(1, -3), size=tuple(shape[-2:]), mode=mode)
    return flat.view(len(latents), *shape)


def _check_finite(values: Tensor, model: Model) -> None:
    # Weights were checked when they were loaded; what is left is a number format too narrow for the computation.
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{model.title} computed NaN in {model.unet.dtype}; use dtype float32, or another VAE")


def _sample(
    model: Model,
    inputs: Inputs,
    settings: Settings,
    run: Pass,
    noise: Tensor,
    later_noise: NoiseSampler,
    x0: Tensor | None,
    callback: Callback | None,
    earlier: int | None = None,
) -> Tensor:
    """One run of the sampler: latents (B, C, h, w)."""
    kind = ConsistencyDenoiser if settings.sampler == "lcm" else Denoiser
    process = run.process
    denoiser = kind(guided_network(model, inputs.guides, run.shape), model.diffusion)
    cond, uncond = _conditioning(inputs, len(run.sigmas) - 1, earlier)
    guided = guided_by_steps(model, denoiser, cond, uncond, settings.guidance_scale, run.sigmas)
    if model.unet.end_embedding_dim:
        check_sampler(settings.sampler)
        guided = told_ends(guided, run.sigmas, settings.gamma, process)
    if inputs.mask is not None and x0 is not None:
        mask = functional.interpolate(inputs.mask, size=run.shape[-2:], mode="area")
        guided = inpaint(guided, x0, mask, noise, process)

    def report(info: dict[str, Any]) -> None:
        if callback is None:
            return
        more = {"pictures": len(noise), "preview": lambda: to_pil(model.vae.decode(info["denoised"]))}
        if callback(info | more) is False:
            raise Stopped

    options: dict[str, Any] = {
        "noise_sampler": later_noise,
        "callback": report,
        "disable": True,
        "process": process,
    }
    if settings.sampler == "tcd":
        options["gamma"] = settings.gamma
    x = initial_latents(noise, run.sigmas[0], x0, process)
    return _SAMPLERS[settings.sampler](guided, x, run.sigmas, **options)


def _conditioning(inputs: Inputs, steps: int, earlier: int | None) -> Passes:
    """What the network is given in each of a pass's steps."""
    cond, uncond, avoided = (
        None if source is None else steps_of(source)(steps, earlier)
        for source in (inputs.cond, inputs.uncond, inputs.avoided)
    )
    assert cond is not None
    passes = Passes(cond, uncond)
    return attend_in_steps(inputs.guides, passes, avoided) if inputs.guides.changes_attention else passes
