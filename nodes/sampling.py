"""From a MODEL, conditioning and a LATENT to new latents, through lcm_core's samplers and the host's own machinery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from lcm_core.diffusion.grids import get_sigmas_lcm
from lcm_core.diffusion.process import RectifiedFlow, VariancePreserving
from lcm_core.diffusion.samplers import (
    NoiseSampler,
    initial_latents,
    initial_noise,
    sample_lcm,
    sample_tcd,
    seeded_noise_sampler,
)
from lcm_core.errors import InputError
from lcm_core.files.recommended import FEW_STEP_SAMPLERS
from lcm_core.pipeline.settings import Settings

from .attachments import with_guidance
from .model_patches import (
    Facts,
    LcmSampling,
    check_prediction,
    inspect_model,
    is_stock_lcm,
    process_of,
    with_sampling,
)
from .model_sampling import noise_scale_of, sample_flow

Latent = dict[str, Any]
Conditioning = list[Any]
Noise = tuple[Tensor, NoiseSampler]
"""The first noise (B, C, ...), and the sampler of all later noise."""
Report = Callable[[int, Tensor, Tensor, int], object]
"""The host's callback: `report(step, x0, x, total_steps)`."""
SAMPLERS = list(FEW_STEP_SAMPLERS)
AUTO = "auto"
"""What stands in the place of a sampler for what the model's file states, with all that belongs to it; lcm where it
says nothing."""
_KINDS = {1: "sequences", 2: "pictures", 3: "videos"}  # by the dimensions of a latent
_SIZE_HINTS = ("downscale_ratio_spacial", "downscale_ratio_temporal")


class Painter:
    """A MODEL made ready for one set of settings; paints any number of latents with them.

    Args:
        model: the host's MODEL; it is cloned, never changed.
        settings: steps, guidance, strength, sampler. Sizes, prompts and seed are not used.
        negative: None leaves no negative pass, which only guidance 1 or a full LCM can do without.

    Raises:
        InputError: settings that this model cannot use.
    """

    def __init__(self, model: Any, settings: Settings, positive: Conditioning, negative: Conditioning | None) -> None:
        facts = inspect_model(model)
        settings.check()
        self.cfg = 1.0 if facts.guidance is not None else settings.guidance_scale
        if negative is None and self.cfg != 1:
            raise InputError(f"guidance_scale {self.cfg:g} needs a negative prompt on this model; connect one or use 1")
        if facts.guidance is not None:
            model = with_guidance(model, settings.guidance_scale)
        self.model = with_sampling(model, facts, settings.original_steps)
        self.settings, self.positive, self.negative = settings, positive, negative
        steps = None if settings.timesteps else settings.num_inference_steps
        self.sigmas = get_sigmas_lcm(
            facts.diffusion.process, steps, settings.original_steps, settings.strength, settings.timesteps
        )

    @property
    def steps(self) -> int:
        """Calls of the network for one picture."""
        return len(self.sigmas) - 1

    def paint(
        self, latent: Latent, noise: Noise, report: Report | None = None, positive: Conditioning | None = None
    ) -> Tensor:
        """New latents (B, C, ...) in the host's scale.

        Args:
            latent: from `read_latent`.
            noise: see `noise_of`.
            report: called in every step; shows the progress and the preview, and raises when the user interrupts.
            positive: in place of the one given before.

        Raises:
            InputError: the strength is below 1 but the latent is empty.
        """
        x0, mask = latent["samples"], latent.get("noise_mask")
        if self.settings.strength < 1 and not bool(x0.any()):
            raise InputError(
                f"strength {self.settings.strength:g} was given with an empty latent; connect an encoded image or use 1"
            )
        if mask is not None:
            mask = _fit_mask(mask, x0)
        first, later = noise
        sampler = make_sampler(self.settings.sampler, self.settings.gamma, later)
        positive = self.positive if positive is None else positive
        negative = positive if self.negative is None else self.negative  # never asked at cfg 1
        return comfy.sample.sample_custom(
            self.model,
            first,
            self.cfg,
            sampler,
            self.sigmas,
            positive,
            negative,
            x0,
            noise_mask=mask,
            callback=report,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        )


def choose_settings(model: Any, guidance_scale: float, **settings: Any) -> tuple[Settings, Facts]:
    """Settings in which a guidance scale of 0 and the sampler `AUTO` mean the model's own, and what was found out about
    the model."""
    facts = inspect_model(model)
    if settings.get("sampler", AUTO) == AUTO:
        settings |= {"sampler": facts.recommended.sampler or "lcm", **facts.recommended.grid}
    return Settings(guidance_scale=guidance_scale or facts.guidance_scale, **settings), facts


def make_sampler(name: str, gamma: float = 0.3, noise_sampler: NoiseSampler | None = None) -> Any:
    """A SAMPLER for any of the host's sampling nodes.

    Args:
        name: "lcm" or "tcd".
        gamma: share of fresh noise in each step (tcd).
        noise_sampler: None continues each picture's own stream of noise, from the seed that the host gives.
    """
    return comfy.samplers.KSAMPLER(sample, {"name": name, "gamma": gamma, "noise_sampler": noise_sampler})


def read_latent(model: Any, latent: Latent) -> Latent:
    """A LATENT as this MODEL can take it: an empty one is given the model's number of channels, and a
    picture for a video model becomes its one frame.

    Raises:
        InputError: another shape, or another number of channels.
    """
    x0, form = latent["samples"], model.get_model_object("latent_format")
    channels, kind = form.latent_channels, _KINDS.get(form.latent_dimensions, "latents")
    if not isinstance(x0, Tensor) or getattr(x0, "is_nested", False):
        raise InputError(f"the LATENT holds several streams, such as picture and sound; this node takes {kind} alone")
    hints = {name: latent[name] for name in _SIZE_HINTS if name in latent}  # newer hosts' empty latents carry them
    x0 = comfy.sample.fix_empty_latent_channels(model, x0, **hints)
    if x0.ndim != 2 + form.latent_dimensions:
        shape = "x".join(map(str, x0.shape))
        raise InputError(
            f"the LATENT, {shape}, is no batch of {kind}, which this MODEL takes; use an empty latent made for it, or "
            "VAE Encode"
        )
    if x0.shape[1] != channels:
        raise InputError(
            f"the LATENT has {x0.shape[1]} channels but this MODEL takes {channels}; encode the picture with its VAE"
        )
    return {name: value for name, value in latent.items() if name not in _SIZE_HINTS} | {"samples": x0}


def noise_of(latent: Latent, seed: int) -> Noise:
    """All noise of a LATENT's pictures: the first from `seed`, the next from `seed + 1`, and so on.

    A picture taken out of a batch (Latent From Batch) keeps the seed of its place there. PyTorch's own stream of random
    numbers is left as the host's sampling nodes leave it: patches draw from it (HyperTile its tiles).
    """
    x0 = latent["samples"]
    comfy.sample.prepare_noise(x0, seed, latent.get("batch_index"))
    places: Sequence[int] = latent.get("batch_index") or range(len(x0))
    seeds = [(seed + int(place)) % 2**64 for place in places]
    return initial_noise(seeds, x0.shape[1:]), _noise_sampler(seeds, x0.shape[1:])


def _fit_mask(mask: Tensor, x0: Tensor) -> Tensor:
    """A noise mask in the size of latents x0, (M, 1, h, w): by area, as lcm_core does, where the host would take single
    points. For videos (M, 1, 1, h, w), or (1, 1, M, h, w) where there are frames that the masks are of."""
    masks = rearrange(mask, "... h w -> (...) 1 h w").float()
    mask = functional.interpolate(masks, x0.shape[-2:], mode="area")
    if x0.ndim == 4:
        return mask
    return rearrange(mask, "m 1 h w -> m 1 1 h w" if x0.shape[2] == 1 else "m 1 h w -> 1 1 m h w")


def reporter(model: Any, total: int) -> Callable[[int], Report]:
    """Progress and preview of several runs of the sampler, `total` steps in all, as one bar.

    `reporter(model, total)(done)` is the callback of a run that begins when `done` steps have been taken.
    """
    show = latent_preview.prepare_callback(model, total)

    def after(done: int) -> Report:
        return lambda step, x0, x, _: show(done + step, x0, x, total)

    return after


def _noise_sampler(seeds: Sequence[int], shape: Sequence[int]) -> NoiseSampler:
    draw = seeded_noise_sampler(seeds, shape)

    # Where the host computes is not known before it loads the model.
    return lambda sigma, sigma_next: draw(sigma, sigma_next).to(sigma.device)


def sample(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
    name: str = "lcm",
    gamma: float = 0.3,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """The host's sampler function. But for flow models it starts from noise and image itself: the host mixes them in
    another proportion."""
    base = model.inner_model.inner_model
    sampling = base.model_sampling
    check_prediction(base)
    stock_lcm = name == "lcm" and is_stock_lcm(sampling)  # right for epsilon, at any of the levels that it keeps
    process = VariancePreserving() if stock_lcm else process_of(sampling)
    extra_args = extra_args or {}
    seed = extra_args.get("seed")
    if noise_sampler is None and seed is not None:
        noise_sampler = _noise_sampler([(seed + i) % 2**64 for i in range(len(x))], x.shape[1:])
    if isinstance(process, RectifiedFlow):
        jump = gamma if name == "tcd" else None
        return sample_flow(model, x, sigmas, noise_scale_of(sampling), extra_args, callback, noise_sampler, jump)
    image = model.latent_image
    x = initial_latents(model.noise, sigmas[0], image if bool(image.any()) else None)
    if name == "lcm":
        return sample_lcm(model, x, sigmas, extra_args, callback, disable, noise_sampler)
    last: dict[str, Any] = {}

    def each(step: dict[str, Any]) -> None:
        last.update(step)
        if callback is not None:
            callback(step)

    with sampling.without_boundary() if isinstance(sampling, LcmSampling) else nullcontext():
        x = sample_tcd(model, x, sigmas, extra_args, each, disable, noise_sampler, process, gamma)
        mask = _mask_at(model, last["sigma"].expand(len(x)), extra_args)
    if mask is None or sigmas[-1] > 0:
        return x
    # tcd ends at timestep 0, with a trace of noise, which belongs only where the image was painted over; `denoised` has
    # the kept parts of the image in it already.
    return torch.lerp(last["denoised"], x, mask.to(x))


def _mask_at(model: Any, sigma: Tensor, extra_args: dict[str, Any]) -> Tensor | None:
    """What the host painted over at a noise level (B,); patches such as Differential Diffusion change it."""
    mask: Tensor | None = extra_args.get("denoise_mask")
    change = extra_args.get("model_options", {}).get("denoise_mask_function")
    if mask is None or change is None:
        return mask
    changed: Tensor = change(sigma, mask, extra_options={"model": model.inner_model, "sigmas": model.sigmas})
    return changed
