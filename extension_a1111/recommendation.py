"""The settings that few-step models want, and when they are already right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from extension_a1111.loras import Accelerated
from extension_a1111.options import LCM_SAMPLER, TCD_SAMPLER
from extension_a1111.translation import Say, english
from lcm_core.files.recommended import FULL_LCM_GUIDANCE, Recommended

MOST_STEPS = 8
"""More steps than this do not help an LCM (arXiv 2310.04378 Table 1)."""
_SAMPLERS = {"lcm": LCM_SAMPLER, "tcd": TCD_SAMPLER}
_LORA_GUIDANCE = (1.0, 2.0)
USUAL_LORA = Recommended(steps=4, guidance_scale=1.0)
"""What to set where neither a LoRA's file nor the settings page says anything."""
USUAL_FULL = Recommended(steps=4, guidance_scale=FULL_LCM_GUIDANCE)
"""Alike, for a full LCM."""
_FULL_GUIDANCE = (2.0, 14.0)  # what full LCMs are trained with (arXiv 2310.04378 Sec. 5)


@dataclass(frozen=True)
class Recommendation:
    """Sampler, steps and CFG scale for one picture, the model that wants them, and what its file states."""

    sampler: str
    steps: int
    guidance_scale: float
    model: str
    is_full_lcm: bool
    recommended: Recommended

    def text(self, say: Say = english) -> str:
        """The reason and the settings, in one line."""
        kind = "{model} is a full LCM" if self.is_full_lcm else "{model} is made for few steps"
        said = self.recommended
        parts = [
            say("{sampler}, {steps} steps, CFG {cfg}", sampler=self.sampler, steps=self.steps, cfg=self._cfg()),
            *([say("gamma {gamma}", gamma=f"{said.gamma:g}")] if said.gamma is not None else []),
            *([say("{steps} original steps", steps=grid)] if (grid := said.original_steps) is not None else []),
        ]
        return f"{say(kind, model=self.model)}: {', '.join(parts)}"

    def _cfg(self) -> str:
        return f"{self.guidance_scale:g}"

    __str__ = text


@dataclass(frozen=True)
class Request:
    """What a picture is going to be painted with, as the user has set it."""

    checkpoint: str
    sampler: str
    steps: int
    guidance_scale: float
    is_unet: bool = True
    """False for Flux, SD3 and their kin."""
    is_full_lcm: bool = False
    has_negative: bool = False
    refiner: str | None = None
    refiner_is_full_lcm: bool = False


def remarks(request: Request, advised: Recommendation | None, say: Say = english) -> list[str]:
    """What is wrong with a request, one line each; none where all is as it should be.

    Args:
        request: as it was sent; nothing is changed.
        advised: what suits its models; None where none of them is for few steps.
        say: the user's language.
    """
    found = []
    is_ours = request.sampler in _SAMPLERS.values()
    if advised is not None and (request.steps, request.guidance_scale) != (advised.steps, advised.guidance_scale):
        found.append(
            say("{settings} would suit it; the button in the accordion sets them.", settings=advised.text(say))
        )
    if not is_ours:
        return found
    if advised is None and request.is_unet:
        found.append(
            say(
                "{model} is no LCM and no LCM-LoRA is in the prompt, so few steps give a poor picture; "
                "the button in the accordion adds an LCM-LoRA or sets another sampler.",
                model=request.checkpoint,
            )
        )
    if request.is_full_lcm and request.has_negative:
        found.append(
            say(
                "{model} is a full LCM, which reads no negative prompt; the button in the accordion clears it.",
                model=request.checkpoint,
            )
        )
    if request.refiner is not None and request.refiner_is_full_lcm != request.is_full_lcm:
        full, plain = request.checkpoint, request.refiner
        full, plain = (full, plain) if request.is_full_lcm else (plain, full)
        found.append(
            say(
                "{full} is a full LCM and {plain} is none, so that the refiner's guidance is wrong; "
                "the button in the accordion takes the refiner out.",
                full=full,
                plain=plain,
            )
        )
    return found


def recommend(
    steps: int,
    guidance_scale: float,
    models: Iterable[Accelerated | None],
    full_lcm: str | None,
    usual: Recommended,
) -> Recommendation | None:
    """What suits the models in use; None where none of them is an LCM or TCD model.

    Args:
        steps, guidance_scale: as they stand; kept where they are in the model's range.
        models: the prompt's LoRAs and the checkpoint, with None for ordinary ones; the first other counts.
        full_lcm: name of the checkpoint, if it takes guidance as w-embedding.
        usual: steps and guidance to set where neither that nor the model's file says anything. Of the guidance that a
            full LCM's file states, up to twice and down to half is kept.
    """
    model = next((found for found in models if found is not None), None)
    if full_lcm is not None:
        model = model or Accelerated(full_lcm, Recommended("lcm"))
    if model is None:
        return None
    said = usual | model.recommended
    steps = steps if 1 <= steps <= MOST_STEPS else int(said.steps or 1)
    guidance = float(said.guidance_scale or 1)
    own = model.recommended.guidance_scale
    span = _LORA_GUIDANCE if full_lcm is None else (own / 2, own * 2) if own else _FULL_GUIDANCE
    kept = guidance_scale if span[0] <= guidance_scale <= span[1] else guidance
    sampler, name = _SAMPLERS[str(said.sampler)], model.name if full_lcm is None else full_lcm
    return Recommendation(sampler, steps, kept, name, full_lcm is not None, model.recommended)
