"""What makes one picture, in numbers and words: validated, stored in every file, enough to make the picture again."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from lcm_core.errors import InputError
from lcm_core.files.reading import check_text
from lcm_core.files.recommended import FEW_STEP_SAMPLERS, MAX_SIDE, SAMPLERS
from lcm_core.networks.prompt import parse_weights, split_parts, texts_at_steps

PROMPT_SYNTAXES = ("a1111", "plain")
"""How prompts are read: weights, changes and the like, see `lcm_core.networks.prompt`, or nothing but words."""
MAX_PIXELS = 4096 * 4096
"""Pixels in all. Attention takes time and memory by the square of it."""

_FRACTIONS = (
    *("guidance_scale", "nag_scale", "nag_tau", "nag_alpha", "gamma"),
    *("strength", "upscale", "upscale_strength", "blend"),
)


@dataclass(frozen=True)
class Settings:
    """The settings of one picture. Two pictures with equal settings, from one model, are equal."""

    prompt: str = ""
    """What to paint; unknown words are allowed, and an empty prompt paints anything."""
    negative_prompt: str = ""
    """What to avoid. Plain models at guidance above 1 read it, and others with `nag_scale`."""
    num_inference_steps: int = 4
    """Calls of the network, 1 or more."""
    guidance_scale: float = 1.0
    """How strictly to follow the prompt; 1 is off. A full LCM wants 3 to 13, an LCM-LoRA 1 to 2."""
    nag_scale: float = 1.0
    """How far normalised attention guidance goes away from the negative prompt, without a negative pass; 1 is off."""
    nag_tau: float = 2.5
    """Times its length that attention may grow by it."""
    nag_alpha: float = 0.5
    """Share of it; the rest is attention without it."""
    seed: int = 0
    """Start of the picture's own stream of noise."""
    width: int = 512
    """Pixels; a multiple of what VAE and U-Net divide by together."""
    height: int = 512
    """The height in pixels, under the same rules as `width`."""
    sampler: str = "lcm"
    """The sampler's name, one of `SAMPLERS`."""
    original_steps: int = 50
    """Timesteps that the distillation knew (lcm and tcd)."""
    timesteps: tuple[int, ...] | None = None
    """Your own timesteps, falling, instead of the sampler's grid."""
    gamma: float = 0.3
    """Share of fresh noise in each step (tcd)."""
    shift: float | None = None
    """The shift of a flow model's noise levels: above 1, more steps at the noisy end. None is the model's own."""
    strength: float = 1.0
    """Share of the way that an input image is noised, in (0, 1]; 1 keeps nothing of it."""
    upscale: float = 1.0
    """Second pass: latents enlarged by this factor (1 to 4), then painted over. 1 is off."""
    upscale_strength: float = 0.5
    """`strength` of the second pass."""
    second_prompt: str = ""
    """What `blend` mixes `prompt` with."""
    blend: float = 0.0
    """Share of the way from the encoding of `prompt` to that of `second_prompt`, in [0, 1]."""
    prompt_syntax: str = "a1111"
    """One of `PROMPT_SYNTAXES`."""

    def __post_init__(self) -> None:
        # Equal settings must be written as equal JSON: 8 and 8.0 would not be.
        for name in ("num_inference_steps", "seed", "width", "height", "original_steps"):
            if hasattr(number := getattr(self, name), "__index__"):  # of numpy, say
                object.__setattr__(self, name, operator.index(number))
        for name in (
            "guidance_scale",
            "nag_scale",
            "nag_tau",
            "nag_alpha",
            "gamma",
            "strength",
            "upscale",
            "upscale_strength",
            "blend",
        ):
            try:
                number = float(getattr(self, name))
            except OverflowError:  # a whole number of hundreds of digits
                number = math.inf
            object.__setattr__(self, name, number)
        if self.shift is not None:
            object.__setattr__(self, "shift", float(self.shift))
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", tuple(int(t) for t in self.timesteps))

    def check(self) -> Settings:
        """Refuse what no model could do; returns itself.

        Raises:
            InputError: names the first setting that is wrong, and what it may be.
        """
        for name in ("prompt", "negative_prompt", "second_prompt"):
            check_text(name, getattr(self, name))
        if self.prompt_syntax not in PROMPT_SYNTAXES:
            raise InputError(f"unknown prompt_syntax {self.prompt_syntax!r:.40}; use {' or '.join(PROMPT_SYNTAXES)}")
        if not 0 <= self.blend <= 1:
            raise InputError(f"blend {self.blend} is outside [0, 1]; 0 is the prompt alone, 1 the second prompt")
        if self.prompt_syntax != "plain":
            parts = [*split_parts(self.prompt), *split_parts(self.second_prompt)]
            for text in (*(text for text, _ in parts), self.negative_prompt):
                parse_weights(texts_at_steps(text, 1)[0])
        self._check_steps()
        for name in ("strength", "upscale_strength"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise InputError(
                    f"{name} {value} is outside (0, 1]; use 1 for a new image, less to keep more of the old"
                )
        if not 1 <= self.upscale <= 4:
            raise InputError(f"upscale {self.upscale} is out of range; use 1 (off) to 4")
        if self.shift is not None and not 0.01 <= self.shift <= 100:
            raise InputError(f"shift {self.shift} is out of range; 1 shifts nothing, 3 is usual")
        if not 0 <= self.gamma <= 1:
            raise InputError(f"gamma {self.gamma} is outside [0, 1]; 0 adds no fresh noise, 1 the most")
        if not (math.isfinite(self.guidance_scale) and 0 <= self.guidance_scale <= 100):
            raise InputError(f"guidance_scale {self.guidance_scale} is out of range; 1 is off, 1 to 15 is usual")
        self._check_nag()
        if self.timesteps is not None and not all(0 <= t < 100_000 for t in self.timesteps):
            raise InputError(f"timesteps {self.timesteps} are out of range; write e.g. 999,749,499,249")
        if not -(2**63) <= self.seed < 2**64:
            raise InputError(f"seed {self.seed} does not fit 64 bits; use 0 to {2**64 - 1}")
        check_size(self.width, self.height)
        return self

    def _check_nag(self) -> None:
        if not 0 <= self.nag_scale <= 100:
            raise InputError(f"nag_scale {self.nag_scale} is out of range; 1 is off, 2 to 10 is usual")
        if not 0 < self.nag_tau <= 100:
            raise InputError(f"nag_tau {self.nag_tau} is out of range; 2.5 is usual")
        if not 0 <= self.nag_alpha <= 1:
            raise InputError(f"nag_alpha {self.nag_alpha} is outside [0, 1]; 0 is off, 0.25 to 0.5 is usual")

    def _check_steps(self) -> None:
        if self.sampler not in SAMPLERS:
            raise InputError(f"unknown sampler {self.sampler!r}; choose one of {', '.join(SAMPLERS)}")
        steps, most = self.num_inference_steps, 1000
        if self.sampler in FEW_STEP_SAMPLERS and self.timesteps is None:
            most = self.original_steps
        if not 1 <= self.original_steps <= 1000:
            raise InputError(f"original_steps {self.original_steps} is out of range; use 1 to 1000 (50 is usual)")
        if not 1 <= steps <= most:
            raise InputError(
                f"{steps} steps are out of range for sampler {self.sampler!r}; use 1 to {most}"
                + (" (more needs a higher original_steps)" if most == self.original_steps else "")
            )


def check_size(width: int, height: int, multiple: int = 1) -> None:
    """Refuse a size that is not positive, too large, or no multiple of `multiple` pixels.

    Raises:
        InputError: names the nearest size that would do.
    """
    for side in (width, height):
        if not 0 < side <= MAX_SIDE:
            raise InputError(f"size {width}x{height} is out of range; use sides of {multiple} to {MAX_SIDE} pixels")
    if width * height > MAX_PIXELS:
        raise InputError(f"size {width}x{height} is too large; use up to {MAX_PIXELS:,} pixels, e.g. 4096x4096")
    if width % multiple or height % multiple:
        near = "x".join(str(max(round(side / multiple), 1) * multiple) for side in (width, height))
        raise InputError(f"size {width}x{height} does not fit this model; use multiples of {multiple}, e.g. {near}")
