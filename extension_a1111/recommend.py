"""The settings that few-step models want, and when they are already right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from extension_a1111.loras import Kind
from extension_a1111.options import LCM_SAMPLER, TCD_SAMPLER

MOST_STEPS = 8
"""More steps than this do not help an LCM (arXiv 2310.04378 Table 1)."""
_SAMPLERS: dict[Kind, str] = {"lcm": LCM_SAMPLER, "tcd": TCD_SAMPLER}
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
    """Sampler, steps and CFG scale for one picture, and the reason."""

    sampler: str
    steps: int
    guidance_scale: float
    reason: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.sampler}, {self.steps} steps, CFG {self.guidance_scale:g}"


def recommend(
    steps: int,
    guidance_scale: float,
    loras: Iterable[tuple[str, Kind | None]],
    checkpoint: tuple[str, Kind | None],
    is_full_lcm: bool,
    wishes: Wishes,
    stated_guidance: float | None = None,
) -> Recommendation | None:
    """What suits the models in use; None where none of them is an LCM or TCD model.

    Args:
        steps, guidance_scale: as they stand; kept where they are in the model's range.
        loras: names and kinds of the prompt's LoRAs.
        checkpoint: its name and kind.
        is_full_lcm: whether it takes guidance as w-embedding.
        wishes: what to set where they are not.
        stated_guidance: what a full LCM's file says of itself; up to twice and down to half of it is kept.
    """
    steps = steps if 1 <= steps <= MOST_STEPS else wishes.steps
    if is_full_lcm:
        span = (stated_guidance / 2, stated_guidance * 2) if stated_guidance else _FULL_GUIDANCE
        kept = _within(guidance_scale, span, stated_guidance or wishes.full_guidance)
        return Recommendation(_SAMPLERS[checkpoint[1] or "lcm"], steps, kept, f"{checkpoint[0]} is a full LCM")
    for name, kind in [*loras, checkpoint]:
        if kind is not None:
            kept = _within(guidance_scale, _LORA_GUIDANCE, wishes.lora_guidance)
            return Recommendation(_SAMPLERS[kind], steps, kept, f"{name} is made for few steps")
    return None


def _within(value: float, span: tuple[float, float], otherwise: float) -> float:
    return value if span[0] <= value <= span[1] else otherwise
