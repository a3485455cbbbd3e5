"""LCM Travel: noise, prompts and images travel together; the frames on the keyframes are the single pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from comfy_api.latest import io
from torch import Tensor
from torch.nn import functional

from lcm_core.diffusion.interpolation import Frame, interpolate, plan_frames, travel_noise_sampler
from lcm_core.errors import InputError

from . import inputs
from .host import schema
from .sampling import AUTO, Conditioning, Latent, Noise, Painter, choose_settings, noise_of, read_latent, reporter

MOST = 4
Item = TypeVar("Item")


class LCMTravel(io.ComfyNode):
    """An animation through prompts and seeds."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="LCMTravel",
            display_name="LCM Travel",
            aliases=["prompt travel", "seed travel", "morph", "animation", "interpolation"],
            description="Frames of a travel through prompts and seeds. The noise of every step travels, so nothing "
            "flickers, and each keyframe is the picture that LCM KSampler makes of its prompt and seed.",
            inputs=[
                inputs.model(),
                io.Conditioning.Input(
                    "positive_1", tooltip="The first keyframe's prompt; alone, the prompt of all seeds."
                ),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent, or encoded images: one for all keyframes or one for each."
                ),
                io.String.Input(
                    "seeds", default="0, 1", tooltip="One seed for all keyframes (the prompt travels), or one for each."
                ),
                inputs.frames(),
                inputs.steps(),
                inputs.guidance_scale(),
                inputs.model_sampler(),
                inputs.strength(),
                inputs.mode(),
                inputs.easing(),
                inputs.loop(),
                *inputs.more_keyframes(io.Conditioning, "positive", MOST, "The next keyframe's prompt."),
                inputs.negative(),
                inputs.gamma(),
                inputs.original_steps(),
            ],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="All frames as one batch, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive_1: Conditioning,
        latent_image: Latent,
        seeds: str = "0, 1",
        frames: int = 24,
        steps: int = 4,
        guidance_scale: float = 0.0,
        mode: str = "slerp",
        easing: str = "linear",
        loop: bool = False,
        negative: Conditioning | None = None,
        sampler: str = AUTO,
        strength: float = 1.0,
        gamma: float = 0.3,
        original_steps: int = 50,
        **positives: Conditioning | None,
    ) -> io.NodeOutput:
        """Paint frame by frame, each alone, as a single picture is painted."""
        prompts = [positive_1, *(found for i in range(2, MOST + 1) if (found := positives.get(f"positive_{i}")))]
        settings, _ = choose_settings(
            model,
            guidance_scale,
            num_inference_steps=steps,
            sampler=sampler,
            strength=strength,
            gamma=gamma,
            original_steps=original_steps,
        )
        latent = read_latent(model, latent_image)
        keyframes = _keyframes(prompts, inputs.read_list(seeds, int, "seeds"), list(latent["samples"].split(1)))
        plan = plan_frames(len(keyframes), frames, easing, loop)
        painter = Painter(model, settings, positive_1, negative)
        after = reporter(model, len(plan) * painter.steps)
        painted = []
        for number, frame in enumerate(plan):
            positive, noise, x0 = _mix(keyframes, frame, mode)
            painted.append(painter.paint({"samples": x0}, noise, after(number * painter.steps), positive))
        return io.NodeOutput({"samples": torch.cat(painted)})


Keyframe = tuple[Conditioning, int, Tensor]


def _keyframes(prompts: list[Conditioning], seeds: list[int], images: list[Tensor]) -> list[Keyframe]:
    """Prompt, seed and latent (1, C, ...) of each keyframe."""
    count = max(len(prompts), len(seeds), len(images))
    if not seeds or any(len(given) not in (1, count) for given in (prompts, seeds, images)):
        raise InputError(
            f"{len(prompts)} prompts, {len(seeds)} seeds and {len(images)} latents make no keyframes; give one each, "
            "or as many as there are keyframes"
        )
    return list(zip(_repeat(prompts, count), _repeat(seeds, count), _repeat(images, count), strict=True))


def _repeat(given: list[Item], count: int) -> Sequence[Item]:
    return given if len(given) == count else given * count


def _mix(keyframes: list[Keyframe], frame: Frame, mode: str) -> tuple[Conditioning, Noise, Tensor]:
    (prompt_a, seed_a, image_a), (prompt_b, seed_b, image_b) = keyframes[frame.start], keyframes[frame.end]
    (first_a, later_a), (first_b, later_b) = (
        noise_of({"samples": image_a}, seed_a),
        noise_of({"samples": image_b}, seed_b),
    )
    t = frame.fraction
    noise = interpolate(first_a, first_b, t, mode), travel_noise_sampler(later_a, later_b, t, mode)
    return mix_conditioning(prompt_a, prompt_b, t, mode), noise, interpolate(image_a, image_b, t, mode)


def mix_conditioning(a: Conditioning, b: Conditioning, t: float, mode: str) -> Conditioning:
    """The host's conditioning `t` of the way from `a` to `b`: embeddings and pooled embeddings are interpolated.

    All else (areas, masks, ControlNets) is `a`'s. Fractions 0 and 1 give `a` and `b` themselves.

    Raises:
        InputError: they have different numbers of parts, or come from different text encoders.
    """
    if t in (0, 1):
        return b if t == 1 else a
    if len(a) != len(b):
        raise InputError(f"a prompt of {len(a)} parts cannot travel to one of {len(b)}; combine prompts alike")
    return [_mix_part(*parts, t, mode) for parts in zip(a, b, strict=True)]


def _mix_part(a: list[Any], b: list[Any], t: float, mode: str) -> list[Any]:
    if a[0].shape[-1] != b[0].shape[-1]:
        raise InputError(
            f"prompts of width {a[0].shape[-1]} and {b[0].shape[-1]} cannot be mixed; encode all with one CLIP"
        )
    length = max(a[0].shape[1], b[0].shape[1])
    extra = dict(a[1])
    pooled_a, pooled_b = a[1].get("pooled_output"), b[1].get("pooled_output")
    if pooled_a is not None and pooled_b is not None:
        extra["pooled_output"] = interpolate(pooled_a, pooled_b, t, mode)
    masks = [_mask(part, length) for part in (a, b) if part[1].get("attention_mask") is not None]
    if masks:  # whatever one of the two looks at is looked at
        extra["attention_mask"] = masks[0] if len(masks) == 1 else torch.maximum(*masks)
    return [interpolate(_pad(a[0], length), _pad(b[0], length), t, mode), extra]


def _mask(part: list[Any], length: int) -> Tensor:
    mask: Tensor = part[1]["attention_mask"]  # (B, L)
    return functional.pad(mask, (0, length - mask.shape[-1]))


def _pad(embedding: Tensor, length: int) -> Tensor:
    return functional.pad(embedding, (0, 0, 0, length - embedding.shape[1]))  # (B, L, D)
