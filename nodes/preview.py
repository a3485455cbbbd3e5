"""The picture that a student paints while it learns."""

from __future__ import annotations

from typing import Any

import latent_preview
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from lcm_core.diffusion.consistency import ConsistencyDenoiser, Denoiser
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_sigmas_lcm
from lcm_core.diffusion.samplers import initial_latents, initial_noise, sample_lcm, sample_tcd, seeded_noise_sampler
from lcm_core.files.recommended import Recommended
from lcm_core.pipeline.settings import Settings
from trainer.distill import Latents
from trainer.students import Student

from .model_sampling import noise_scale_of


@torch.no_grad()
def paint_preview(
    student: Student, recommended: Recommended, data: Latents, diffusion: Diffusion, model: Any, vae: Any
) -> Image.Image:
    """The first prompt of the data, from the same noise every time, sampled as the student is meant to be.

    Args:
        student: what has been learnt so far.
        recommended: its sampler, steps, gamma and grid.
        data: what it learns from.
        diffusion: of the MODEL.
        model: the MODEL that is distilled.
        vae: decodes; None shows the latents as the host previews them.
    """
    network, shape = student.networks.target, data.latents.shape[1:]
    first = {name: value[:1] for name, value in data.conditioning.items()}
    process, is_tcd = diffusion.process, recommended.sampler == "tcd"
    kind = Denoiser if is_tcd else ConsistencyDenoiser
    denoiser = kind(lambda x, t: network(x, t, first, None), diffusion)
    device = next(student.trained.parameters()).device
    sigmas = get_sigmas_lcm(process, recommended.steps, recommended.original_steps or Settings.original_steps)
    x = initial_latents(initial_noise([0], shape, device), sigmas[0], process=process)
    options: dict[str, Any] = {"disable": True, "noise_sampler": seeded_noise_sampler([0], shape, device)}
    if is_tcd:
        x = sample_tcd(denoiser, x, sigmas, gamma=recommended.gamma or 0.0, process=process, **options)
    else:
        x = sample_lcm(denoiser, x, sigmas, process=process, **options)
    return _decode(x * noise_scale_of(model.get_model_object("model_sampling")), model, vae)


@torch.inference_mode()
def _decode(x: Tensor, model: Any, vae: Any) -> Image.Image:
    if vae is None:
        return _rough_picture(x, model.model.latent_format)
    images = vae.decode(model.model.process_latent_out(x))
    image = rearrange(images, "... h w c -> (...) h w c")[0, ..., :3]  # of a video the first frame
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().cpu().numpy())


def _rough_picture(x: Tensor, latent_format: Any) -> Image.Image:
    """Latents (1, C, ...) as the host previews them; where it has been told not to, their first channels as colours."""
    previewer = latent_preview.get_previewer(x.device, latent_format)
    if previewer is not None:
        return previewer.decode_latent_to_preview(x)
    colours = rearrange(x, "1 c ... h w -> c (...) h w")[:3, 0].sigmoid()  # of a video the first frame
    shown = colours.expand(3, -1, -1) if len(colours) < 3 else colours
    return Image.fromarray((rearrange(shown, "c h w -> h w c") * 255).round().byte().cpu().numpy())
