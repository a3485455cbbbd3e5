"""The embedded model's networks as diffusers' own classes, which do not read its files of 8 bits."""

from __future__ import annotations

from diffusers import AutoencoderKL

from lcm_core.files.checkpoint import read_component
from lcm_core.pipeline.sources import MODELS

EMOJI = MODELS / "emoji"


def embedded_vae() -> AutoencoderKL:
    """Its VAE, in float32."""
    component = read_component(EMOJI, "vae")
    vae = AutoencoderKL.from_config(component.config)
    vae.load_state_dict(component.tensors)
    return vae.eval()
