"""The settings that few-step models want, and when they are already right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from extension_a1111.loras import Accelerated
from extension_a1111.options import LCM_SAMPLER, TCD_SAMPLER
from lcm_core.files.recommended import Stated

MOST_STEPS = 8
"""More steps than this do not help an LCM (arXiv 2310.04378 Table 1)."""
_SAMPLERS = {"lcm": LCM_SAMPLER, "tcd": TCD_SAMPLER}
_LORA_GUIDANCE = (1.0, 2.0)
_FULL_GUIDANCE = (2.0, 14.0)  # what full LCMs are trained with (arXiv 2310.04378 Sec. 5)


@dataclass(frozen=True)
class Wishes:
    """The user's own idea of good settings, from the settings page."""

    steps: int = 4
    lora_guidance: float = 1.0
    full_guidance: float = 8.0


@dataclass(frozen=True)
class Recommendation:
    """Sampler, steps and CFG scale for one picture, the reason, and what the model's file states."""

    sampler: str
    steps: int
    guidance_scale: float
    reason: str
    stated: Stated

    def __str__(self) -> str:
        said = f"{self.sampler}, {self.steps} steps, CFG {self.guidance_scale:g}{self.stated.remark}"
        return f"{self.reason}: {said}"


def recommend(
    steps: int,
    guidance_scale: float,
    models: Iterable[Accelerated | None],
    full_lcm: str | None,
    wishes: Wishes,
    stated_guidance: float | None = None,
) -> Recommendation | None:
    """What suits the models in use; None where none of them is an LCM or TCD model.

    Args:
        steps, guidance_scale: as they stand; kept where they are in the model's range.
        models: the prompt's LoRAs and the checkpoint, with None for ordinary ones; the first other counts.
        full_lcm: name of the checkpoint, if it takes guidance as w-embedding.
        wishes: what to set where neither that nor the model's file says anything.
        stated_guidance: what a full LCM's file says of itself; up to twice and down to half of it is kept.
    """
    model = next((found for found in models if found is not None), None)
    if full_lcm is not None:
        model = model or Accelerated(full_lcm, Stated("lcm"))
        span = (stated_guidance / 2, stated_guidance * 2) if stated_guidance else _FULL_GUIDANCE
        kept, reason = (
            _within(guidance_scale, span, stated_guidance or wishes.full_guidance),
            f"{full_lcm} is a full LCM",
        )
    elif model is not None:
        kept, reason = (
            _within(guidance_scale, _LORA_GUIDANCE, wishes.lora_guidance),
            f"{model.name} is made for few steps",
        )
    else:
        return None
    stated = model.stated
    wanted = steps if 1 <= steps <= MOST_STEPS else stated.steps or wishes.steps
    return Recommendation(_SAMPLERS[stated.sampler], wanted, kept, reason, stated)


def _within(value: float, span: tuple[float, float], otherwise: float) -> float:
    return value if span[0] <= value <= span[1] else otherwise
