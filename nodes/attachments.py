"""What travels with a MODEL through all its clones, and into the files that the host saves of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import uuid5

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.recommended import RECOMMENDED_KEY, Recommended, recommended_in

from .guidance import BIAS, KEY, TO_SAVED, Guidance, State, get_guidance, saver

_RECOMMENDED = "lcm_suite.recommended"


def attach_guidance(model: Any, guidance: Guidance) -> None:
    """Make a MODEL known as a full LCM, also to files that the host saves of it."""
    model.set_attachments(KEY, guidance)
    _patch_saving(model)


def attach_recommended(model: Any, recommended: Recommended) -> None:
    """Let a MODEL know how its file, or that of its LoRA, wants to be sampled; one that is not for few steps leaves
    what it knew. Files that the host saves of it will say so too."""
    if recommended.is_distilled:
        model.set_attachments(_RECOMMENDED, recommended)
        _patch_saving(model)


def recommended_of(model: Any) -> Recommended:
    """How a MODEL wants to be sampled, as far as it is known."""
    found: Recommended = getattr(model, "attachments", {}).get(_RECOMMENDED, Recommended())
    return found


def is_for_few_steps(model: Any) -> bool:
    """Whether a MODEL is known to be made for few steps already: a full LCM, or one with a LoRA that says so."""
    return get_guidance(model) is not None or recommended_of(model).is_distilled


def with_guidance(model: Any, guidance_scale: float) -> Any:
    """A clone of a full LCM that follows this guidance scale, in place of any before."""
    guidance = get_guidance(model)
    if guidance is None:
        raise InputError("this MODEL has no guidance embedding; load a full LCM with the LCM Checkpoint Loader")
    shift = guidance.shift_for(guidance_scale)
    change = shift if guidance.shift is None else shift - guidance.shift
    clone = model.clone()
    clone.add_patches({BIAS: ("diff", (change,))})
    # Equal weights are to be known as such: else the host would load them again for every picture.
    clone.patches_uuid = uuid5(model.patches_uuid, repr(guidance_scale))
    attach_guidance(clone, replace(guidance, shift=shift))
    return clone


def take_recommended(state: State, metadata: Mapping[str, str], name: str) -> Recommended:
    """What a checkpoint says, in its metadata or, where the host saved it, in a tensor; that is taken out.

    Args:
        state: the checkpoint's state dict.
        metadata: of the file.
        name: the file's, for the message.

    Raises:
        InputError: see `recommended_in`.
    """
    saved: Tensor | None = state.pop(RECOMMENDED_KEY, None)
    if saved is None or RECOMMENDED_KEY in metadata:
        return recommended_in(metadata, name)
    text = bytes(saved.to(torch.uint8).flatten().tolist()).decode("utf-8", errors="replace")
    return recommended_in({RECOMMENDED_KEY: text}, name)


def save_with_recommended(plain: Callable[[State], State], recommended: Recommended, state: State) -> State:
    """A state dict as the host saves it, with what is recommended as a tensor: the host writes metadata of its own.

    Args:
        plain: the way to save it without.
        recommended: of the MODEL that is saved.
        state: of the U-Net.
    """
    said = json.dumps(recommended.said).encode()
    return {**plain(state), RECOMMENDED_KEY: torch.tensor(list(said), dtype=torch.uint8)}


def _patch_saving(model: Any) -> None:
    config = model.model.model_config
    guidance = getattr(model, "attachments", {}).get(KEY) or vars(config).get("lcm_suite_guidance")
    # of the class: the config itself may hold what an earlier MODEL was saved with
    save = partial(getattr(type(config), TO_SAVED), config) if guidance is None else saver(config, guidance)
    recommended = recommended_of(model)
    if recommended.is_distilled:
        save = partial(save_with_recommended, save, recommended)
    model.add_object_patch(f"model_config.{TO_SAVED}", save)
