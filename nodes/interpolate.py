"""LCM Latent Interpolator: frames between latents."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from lcm_core.diffusion.interpolation import travel
from lcm_core.errors import InputError

from . import inputs
from .host import schema

MOST = 6


class LCMLatentInterpolator(io.ComfyNode):
    """An animation through latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="LCMLatentInterpolator",
            display_name="LCM Latent Interpolator",
            aliases=["LatentInterpolate", "slerp", "lerp", "morph", "animation"],
            description="Frames between two or more latents. Connect several latents, or one batch whose pictures are "
            "the keyframes. Several batches travel side by side: first all frames of the first pictures, and so on.",
            inputs=[
                io.Latent.Input("latent_1", tooltip="The first keyframe; alone, a batch of all keyframes."),
                *inputs.more_keyframes(io.Latent, "latent", MOST, "The next keyframe, of the same size."),
                inputs.frames(),
                inputs.mode(),
                inputs.easing(),
                inputs.loop(),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="All frames as one batch.")],
        )

    @classmethod
    def execute(
        cls,
        latent_1: dict[str, Any],
        frames: int = 24,
        mode: str = "slerp",
        easing: str = "linear",
        loop: bool = False,
        **latents: dict[str, Any] | None,
    ) -> io.NodeOutput:
        """Stack the keyframes and travel."""
        others = [latents.get(f"latent_{i}") for i in range(2, MOST + 1)]
        keyframes = stack_keyframes([latent["samples"] for latent in (latent_1, *others) if latent is not None])
        animations = travel(keyframes, frames, mode, easing, loop)  # (F, B, C, h, w)
        return io.NodeOutput({"samples": rearrange(animations, "frames batch ... -> (batch frames) ...")})


def stack_keyframes(latents: list[Tensor]) -> Tensor:
    """Keyframes (K, B, ...) of K batches, those of one picture serving all B; or of the pictures of a single batch.

    Raises:
        InputError: sizes that differ, or batches that do not pair up.
    """
    if len(latents) == 1:
        return latents[0].unsqueeze(1)
    batch = max(len(latent) for latent in latents)
    for number, latent in enumerate(latents, 1):
        if latent.shape[1:] != latents[0].shape[1:]:
            raise InputError(
                f"latent_{number} is {_size(latent)} but latent_1 is {_size(latents[0])}; give all keyframes one size"
            )
        if len(latent) not in (1, batch):
            raise InputError(
                f"latent_{number} is a batch of {len(latent)} but the largest is one of {batch}; give batches of one "
                "length, or single latents"
            )
    return torch.stack([latent.expand(batch, *latent.shape[1:]) for latent in latents])


def _size(latent: Tensor) -> str:
    return "x".join(str(length) for length in latent.shape[1:])
