"""A full LCM's guidance on a host's MODEL: found, set, and kept when the host's own nodes load and save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lcm_core.diffusion.guidance import guidance_bias
from lcm_core.files.recommended import FULL_LCM_GUIDANCE, recommended_in

BIAS = "diffusion_model.time_embed.0.bias"
"""The weight of a MODEL that guidance shifts."""
KEY = "lcm_suite.guidance"  # what travels with a MODEL through all its clones
_SAVED_BIAS, _SAVED_COND_PROJ = "time_embed.0.bias", "time_embed.cond_proj.weight"
_COND_PROJ = (_SAVED_COND_PROJ, "time_embedding.cond_proj.weight")
_LINEAR_1 = ("time_embed.0.weight", "time_embedding.linear_1.weight")
_SAVED_SCALE = "lcm_suite.guidance_scale"  # a tensor: the host writes no metadata of ours
TO_SAVED = "process_unet_state_dict_for_saving"
State = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Guidance:
    """How a full LCM takes guidance.

    The host's U-Net has no place for `cond_proj`, but for one guidance scale it is a shift of the first time layer's
    bias; see `lcm_core.diffusion.guidance.guidance_bias`.
    """

    cond_proj: Tensor  # (C, D)
    linear_1: Tensor  # (E, C): the first time layer's weight as loaded, before any LoRA
    default_scale: float = FULL_LCM_GUIDANCE
    shift: Tensor | None = None  # (E,): what has been added to the bias by now

    def shift_for(self, guidance_scale: float) -> Tensor:
        """What a guidance scale adds to the bias, (E,)."""
        return guidance_bias(guidance_scale, self.cond_proj, self.linear_1)


def get_guidance(model: Any) -> Guidance | None:
    """How the MODEL takes guidance, if it is a full LCM.

    Known from LCM Checkpoint Loader, from the host's loader for the embedded model, and on hosts that note the file
    that a MODEL came from (0.33) from that file.
    """
    attached = getattr(model, "attachments", {}).get(KEY)
    config = getattr(model.model, "model_config", None)
    settled = vars(config).get("lcm_suite_guidance") if config is not None else None  # the host warns of unknown names
    return attached or settled or _of_file(model)


def settle_guidance(config: Any, guidance: Guidance) -> None:
    """Make a model that the host is loading known as a full LCM whose bias holds `guidance.shift`, by its config."""
    config.lcm_suite_guidance = guidance
    setattr(config, TO_SAVED, saver(config, guidance))


def take_guidance(state: State, metadata: Mapping[str, str]) -> Guidance | None:
    """Take `cond_proj` out of a checkpoint's state dict, which the host would drop with a warning."""
    saved_scale = state.pop(_SAVED_SCALE, FULL_LCM_GUIDANCE)
    cond_proj = _find(state, _COND_PROJ)
    if cond_proj is None:
        return None
    said = recommended_in(metadata, "the checkpoint").guidance_scale
    scale = float(saved_scale if said is None else said)
    return Guidance(state.pop(cond_proj).float(), state[str(_find(state, _LINEAR_1))].float().clone(), scale)


def save_with_guidance(plain: Callable[[State], State], guidance: Guidance, state: State) -> State:
    """A U-Net's state dict as the host saves it, with `cond_proj` back in its place and the bias free of guidance.

    Args:
        plain: the host's own way.
        guidance: of the MODEL that is saved.
        state: of the U-Net.
    """
    state = dict(state)
    if guidance.shift is not None:  # newer hosts apply their patches when a weight is moved, and not before
        bias = state[_SAVED_BIAS].to("cpu")
        state[_SAVED_BIAS] = (bias.float() - guidance.shift).to(bias.dtype)
    state[_SAVED_COND_PROJ] = guidance.cond_proj.contiguous()
    return {**plain(state), _SAVED_SCALE: torch.tensor(guidance.default_scale)}


def saver(config: Any, guidance: Guidance) -> Callable[[State], State]:
    """`save_with_guidance` for a model of this config of the host."""
    return partial(save_with_guidance, partial(getattr(type(config), TO_SAVED), config), guidance)


def _of_file(model: Any) -> Guidance | None:
    origin = getattr(model, "cached_patcher_init", None)  # how newer hosts load a MODEL once more
    path = origin[1][0] if origin and origin[1] else None
    if not isinstance(path, str) or not path.endswith((".safetensors", ".sft")) or not Path(path).is_file():
        return None
    return _read_guidance(path, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read_guidance(path: str, changed: int) -> Guidance | None:
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        found = [_find(keys, ends) for ends in (_COND_PROJ, _LINEAR_1, (_SAVED_SCALE,))]
        state = {key: file.get_tensor(key) for key in found if key is not None}
        return take_guidance(state, file.metadata() or {})


def _find(keys: Any, ends: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key.endswith(ends)), None)
