"""Inputs that several nodes share, so that they are named, limited and explained in one way; and reading lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from comfy_api.latest import io

from lcm_core.diffusion.interpolation import EASINGS, MODES
from lcm_core.errors import InputError

from .sampling import AUTO, SAMPLERS

MAX_SEED = 0xFFFFFFFFFFFFFFFF
_SAMPLERS = "lcm for LCM models and LCM-LoRAs. tcd for models and LoRAs that were distilled with tcd or segmented."
ASK, CONTINUE, START_ANEW = IF_EXISTS = ("ask", "continue", "start anew")
"""What to do where a run of LCM Distiller of the same name was begun with something else."""
Number = TypeVar("Number", int, float)


def model(tooltip: str = "A full LCM, or a model with an LCM-LoRA.") -> Any:
    """The model."""
    return io.Model.Input("model", tooltip=tooltip)


def positive() -> Any:
    """The prompt."""
    return io.Conditioning.Input("positive", tooltip="What to paint.")


def negative() -> Any:
    """The negative prompt."""
    return io.Conditioning.Input(
        "negative", optional=True, tooltip="What to avoid; used only with guidance above 1 on an LCM-LoRA."
    )


def more_keyframes(kind: Any, name: str, most: int, tooltip: str) -> list[Any]:
    """Optional inputs `name`_2 to `name`_`most`; hosts that grow inputs by themselves are not old enough."""
    return [kind.Input(f"{name}_{number}", optional=True, tooltip=tooltip) for number in range(2, most + 1)]


def steps() -> Any:
    """Number of steps."""
    return io.Int.Input(
        "steps", default=4, min=1, max=1000, tooltip="Calls of the network. 4 is usual, 1 is quickest, 8 is finest."
    )


def original_steps() -> Any:
    """Steps that the distillation knew."""
    return io.Int.Input(
        "original_steps",
        default=50,
        min=1,
        max=1000,
        optional=True,
        tooltip="Timesteps that the distillation knew. 50 for nearly all LCM models and LCM-LoRAs.",
    )


def timesteps() -> Any:
    """The user's own grid."""
    return io.String.Input(
        "timesteps",
        default="",
        optional=True,
        tooltip="Your own falling timesteps, such as 999, 759, 499, 259, in place of steps. Empty: the right ones.",
    )


def strength() -> Any:
    """Image to image."""
    return io.Float.Input(
        "strength",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="How much of an input image is painted over: 1 all of it, 0.3 little. All steps are run, and the first "
        "one starts exactly there. 1 for an empty latent.",
    )


def guidance_scale() -> Any:
    """Guidance, with the model's own as default."""
    return io.Float.Input(
        "guidance_scale",
        default=0.0,
        min=0.0,
        max=100.0,
        step=0.1,
        tooltip="How strictly to follow the prompt. 0: the model's own (a full LCM: 8 or what its file says; LCM-LoRA: "
        "1). A full LCM takes 3 to 13 at no cost; with an LCM-LoRA 1 to 2, and above 1 each step takes twice the time.",
    )


def sampler() -> Any:
    """Which sampler."""
    return io.Combo.Input("sampler", options=SAMPLERS, default="lcm", tooltip=_SAMPLERS)


def model_sampler() -> Any:
    """Which sampler, with the model's own as default."""
    return io.Combo.Input(
        "sampler",
        options=[AUTO, *SAMPLERS],
        default=AUTO,
        tooltip="auto: what the model's file states, with gamma and original steps, if LCM Checkpoint Loader, LCM LoRA "
        f"Convert or LCM Distiller put it in; else lcm. {_SAMPLERS}",
    )


def gamma() -> Any:
    """TCD's gamma."""
    return io.Float.Input(
        "gamma",
        default=0.3,
        min=0.0,
        max=1.0,
        step=0.01,
        optional=True,
        tooltip="tcd only: share of fresh noise in each step. 0 is smooth and always the same, more gives more detail.",
    )


def seed() -> Any:
    """The seed."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=MAX_SEED,
        control_after_generate=True,
        tooltip="Start of the first picture's noise; the next pictures of a batch take the next seeds.",
    )


def frames() -> Any:
    """How many frames."""
    return io.Int.Input("frames", default=24, min=1, max=4096, tooltip="Frames to make, keyframes included.")


def mode() -> Any:
    """How to interpolate."""
    return io.Combo.Input(
        "mode",
        options=list(MODES),
        default="slerp",
        tooltip="slerp keeps contrast between frames; lerp is a plain mix.",
    )


def easing() -> Any:
    """How time runs between keyframes."""
    return io.Combo.Input(
        "easing", options=list(EASINGS), default="linear", tooltip="How the speed changes between two keyframes."
    )


def loop() -> Any:
    """Back to the start."""
    return io.Boolean.Input(
        "loop", default=False, tooltip="Travel on from the last keyframe to the first, so that the animation repeats."
    )


def read_list(text: str, number: Callable[[str], Number], name: str) -> list[Number]:
    """Numbers from text such as "1, 2, 4".

    Raises:
        InputError: something else than numbers.
    """
    try:
        return [number(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise InputError(f"{name} '{text}' is no list of numbers; write it like 1, 2, 4") from error
