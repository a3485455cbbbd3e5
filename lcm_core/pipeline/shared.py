"""A diffusers pipeline that is in memory already, as a `Model` that shares its networks."""

from __future__ import annotations

from typing import Any

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import info_from_configs
from lcm_core.files.recommended import FULL_LCM_GUIDANCE, Recommended
from lcm_core.networks.text_encoder import Encoder, TextEncoder
from lcm_core.networks.tokenizer import Tokenizer
from lcm_core.networks.unet import UNet
from lcm_core.networks.vae import VAE
from lcm_core.pipeline.model import Model, diffusion_of

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_DISTILLED = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}


def share_model(pipe: Any) -> Model:
    """The networks of a StableDiffusionPipeline or StableDiffusionXLPipeline; nothing is copied.

    Weights that are changed in the one are changed in the other, LoRAs that the pipeline has loaded included. How the
    model wants to be sampled, its scheduler says: LCMScheduler and TCDScheduler stand for a distilled one.

    Raises:
        InputError: another kind of pipeline, or one without a part that is needed.
    """
    for name in _PARTS:
        if getattr(pipe, name, None) is None:
            raise InputError(
                f"{type(pipe).__name__} has no {name}; give a StableDiffusionPipeline or StableDiffusionXLPipeline"
            )
    unet, vae = UNet(pipe.unet), VAE(pipe.vae)
    if unet.in_channels != vae.latent_channels:
        raise InputError(f"{type(pipe).__name__} is no text-to-image pipeline; give StableDiffusionPipeline(**parts)")
    pairs = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
    found = [(getattr(pipe, text, None), getattr(pipe, words, None)) for text, words in pairs]
    encoders = [
        Encoder(text, Tokenizer(words, text.config.max_position_embeddings))
        for text, words in found
        if text is not None
    ]
    name = getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__
    info = info_from_configs(pipe.unet.config, pipe.scheduler.config, name)
    sampler = _DISTILLED.get(type(pipe.scheduler).__name__)
    is_full_lcm = unet.guidance_embedding_dim is not None
    guidance = FULL_LCM_GUIDANCE if is_full_lcm else None
    said = Recommended(
        sampler="lcm" if is_full_lcm and sampler is None else sampler,
        guidance_scale=guidance,
        teacher_guidance_scale=guidance,
    )
    size = pipe.unet.config.sample_size
    return Model(
        name=name,
        unet=unet,
        vae=vae,
        text=TextEncoder(encoders),
        diffusion=diffusion_of(info),
        resolution=(size if isinstance(size, int) else max(size)) * vae.scale,
        recommended=said,
    )
