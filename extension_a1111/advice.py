"""What to set for the models in use: applied to a request, or to the page when the button is pressed."""

from __future__ import annotations

import functools
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules import shared

from extension_a1111 import host
from extension_a1111.architecture import checkpoint_width, context_width
from extension_a1111.guidance_embedding import no_embedding, read_cond_proj
from extension_a1111.loras import find_loras, kind_of_name, read_accelerated
from extension_a1111.options import SAMPLERS, Options, read_options
from extension_a1111.recommendation import (
    MOST_STEPS,
    USUAL_FULL,
    USUAL_LORA,
    Recommendation,
    Request,
    recommend,
    remarks,
)
from extension_a1111.translation import explain
from lcm_core.files.recommended import Recommended

NOTHING = "No LCM-LoRA in the prompt, and the checkpoint is no LCM: nothing was changed."
_PLAIN_STEPS, _PLAIN_GUIDANCE = 20, 7.0  # what the hosts' own pages begin with


def apply(p: Any, args: Sequence[Any], axes: Mapping[str, Any]) -> None:
    """Set a request's sampler, steps and CFG where that is wished for; say what is wrong with it then.

    Raises:
        InputError: options out of range, or a LoRA file that cannot be read.
    """
    advised = _advise(host.chosen_checkpoint(p), host.prompts_of(p), p.steps, p.cfg_scale)
    options = read_options(args, axes)
    if options.auto and advised is not None:
        _set(p, advised)
        p.lcm_suite = functools.partial(read_options, args, {**_stated(advised, options), **axes})
    for remark in remarks(_request(p), advised, host.say()):
        p.comment(f"LCM Suite: {remark}")


def offer(
    prompt: str, sampler_name: str, steps: int, cfg_scale: float, gamma: float, original_steps: int
) -> tuple[str, int, float, float, int, str]:
    """New values for the page, and what to say about them; the old ones where no LCM is in use."""
    old = sampler_name, steps, cfg_scale, gamma, original_steps
    try:
        advised = _advise(host.chosen_checkpoint(), prompt, int(steps), float(cfg_scale))
    except ValueError as error:
        return *old, html.escape(explain(error, host.say()))
    if advised is None:
        return *old, host.say()(NOTHING)
    gamma = gamma if advised.recommended.gamma is None else advised.recommended.gamma
    grid = advised.recommended.original_steps or Options.original_steps  # not what an earlier model left
    said = html.escape(f"{advised.text(host.say())}.")
    return advised.sampler, advised.steps, advised.guidance_scale, gamma, grid, said


def put_right(
    prompt: str,
    negative_prompt: str,
    sampler_name: str,
    steps: int,
    cfg_scale: float,
    gamma: float,
    original_steps: int,
) -> tuple[str, str, str, int, float, float, int, str]:
    """New values for the page so that nothing is left to remark on, and what to say about them.

    A plain checkpoint with a sampler of ours gets an LCM-LoRA that fits it, or the host's first sampler where there is
    none; a negative prompt that a full LCM does not read is cleared.
    """
    steps, cfg_scale = int(steps), float(cfg_scale)
    try:
        file = host.chosen_checkpoint()
        is_ours = sampler_name in SAMPLERS and file is not None and _is_unet(file)
        is_plain = is_ours and _advise(file, prompt, steps, cfg_scale) is None
        lora = _fitting_lora(file) if is_plain and file is not None else None
    except ValueError as error:
        said = html.escape(explain(error, host.say()))
        return prompt, negative_prompt, sampler_name, steps, cfg_scale, gamma, original_steps, said
    if is_plain and file is not None and lora is None:
        words = "{model} is no LCM, and no LCM-LoRA for it was found: its usual sampler, steps and CFG are set."
        said = html.escape(host.say()(words, model=file.stem))
        usual = (host.first_sampler(), _PLAIN_STEPS, _PLAIN_GUIDANCE)
        return prompt, negative_prompt, *usual, gamma, original_steps, said
    if lora is not None:
        prompt = f"{prompt} <lora:{lora}:1>".strip()
    offered = offer(prompt, sampler_name, steps, cfg_scale, gamma, original_steps)
    if offered[0] in SAMPLERS and _is_full_lcm(file):
        negative_prompt = ""
    return prompt, negative_prompt, *offered


def fit_refiner(none: str, sampler_name: str, named: str) -> str:
    """The page's refiner, or `none` where one of the two models is a full LCM and the other is not."""
    refiner, file = host.checkpoint_named(named), host.chosen_checkpoint()
    fits = refiner is None or sampler_name not in SAMPLERS or _is_full_lcm(refiner) == _is_full_lcm(file)
    return named if fits else none


def check_guidance_embedding(p: Any) -> None:
    """Refuse guidance as w-embedding where the request's checkpoint does not read it.

    Raises:
        InputError: it has none.
    """
    file = host.chosen_checkpoint(p)
    if file is not None and not _is_full_lcm(file):
        raise no_embedding(file)


def _advise(file: Path | None, prompt: str, steps: int, cfg_scale: float) -> Recommendation | None:
    name = file.stem if file else ""
    full_lcm = name if _is_full_lcm(file) else None
    # A full LCM's own file comes first: LoRAs on top of it change its style, not its sampler.
    loras = [] if full_lcm else [read_accelerated(lora.name, host.lora_file(lora.name)) for lora in find_loras(prompt)]
    models = [*loras, read_accelerated(name, file)]
    return recommend(steps, cfg_scale, models, full_lcm, _usual(full_lcm is not None))


def _request(p: Any) -> Request:
    file, refiner = host.chosen_checkpoint(p), host.refiner_file(p)
    return Request(
        file.stem if file else "",
        p.sampler_name,
        p.steps,
        p.cfg_scale,
        is_unet=p.sampler_name not in SAMPLERS or file is None or _is_unet(file),
        is_full_lcm=_is_full_lcm(file),
        has_negative=bool(host.negative_prompts_of(p).strip()),
        refiner=refiner.stem if refiner else None,
        refiner_is_full_lcm=_is_full_lcm(refiner),
    )


def _is_full_lcm(file: Path | None) -> bool:
    return file is not None and read_cond_proj(file) is not None


def _is_unet(file: Path) -> bool:
    """Whether a checkpoint is a Stable Diffusion: flow models are for few steps in ways that their files do not say.

    Other formats than safetensors are not looked into, and count as one.
    """
    return file.suffix.lower() != ".safetensors" or checkpoint_width(file) is not None


def _fitting_lora(checkpoint: Path) -> str | None:
    """The first LoRA of the host whose name says that it is for few steps, and that fits a checkpoint."""
    width = checkpoint_width(checkpoint)
    for name, file in host.all_loras():
        if kind_of_name(name) and width is not None and context_width(file) == width:
            return name
    return None


def _stated(advised: Recommendation, options: Options) -> dict[str, float]:
    """What the model's file states, as far as nobody asked for something else."""
    said = advised.recommended.grid
    return {name: value for name, value in said.items() if getattr(options, name) == getattr(Options, name)}


def _set(p: Any, advised: Recommendation) -> None:
    p.sampler_name, p.steps, p.cfg_scale = advised.sampler, advised.steps, advised.guidance_scale
    if hasattr(p, "scheduler"):
        p.scheduler = host.AUTOMATIC
    if getattr(p, "hr_second_pass_steps", 0) > MOST_STEPS:
        p.hr_second_pass_steps = 0  # as many as in the first pass
    if hasattr(p, "hr_cfg"):
        p.hr_cfg = advised.guidance_scale


def _usual(full_lcm: bool) -> Recommended:
    """What the settings page says."""
    given = shared.opts.data
    usual, field = (USUAL_FULL, "lcm_suite_full_cfg") if full_lcm else (USUAL_LORA, "lcm_suite_lora_cfg")
    steps, scale = given.get("lcm_suite_steps", usual.steps), given.get(field, usual.guidance_scale)
    return Recommended(steps=int(steps), guidance_scale=float(scale))
