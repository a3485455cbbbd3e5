"""How a model wants to be sampled: one record, whether a file's metadata, a diffusers folder or a model card holds it.

Exporters and the trainer write it; the pipeline, the nodes and the web UI's extension follow it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError
from lcm_core.files.reading import parse_json
from lcm_core.files.safetensors import read_json, read_metadata

FEW_STEP_SAMPLERS = ("lcm", "tcd")
"""The samplers for distilled models, which walk the grid of `original_steps`."""
TEACHER_SAMPLERS = ("euler", "dpmpp_2m", "dpm_2m")
"""The samplers for plain models, which take 20 to 50 steps. "euler" is deterministic DDIM."""
SAMPLERS = FEW_STEP_SAMPLERS + TEACHER_SAMPLERS
MAX_SIDE = 8192
"""Pixels along one side."""
FULL_LCM_GUIDANCE = 8.0
"""The guidance scale of the tables in arXiv 2310.04378, which a full LCM takes when its file does not say."""

RECOMMENDED_KEY = "lcm_suite.recommended"
"""Safetensors metadata: JSON of a `Recommended`."""
FOLDER_KEY = "_lcm_suite"
"""The same in scheduler_config.json of a diffusers folder. diffusers passes over names that begin so."""
SCHEDULERS = {"lcm": "LCMScheduler", "tcd": "TCDScheduler"}
"""diffusers' class for each few-step sampler."""
_LIMITS: dict[str, tuple[type, float, float]] = {
    "steps": (int, 1, 1000),
    "gamma": (float, 0, 1),
    "original_steps": (int, 1, 1000),
    "shift": (float, 0.01, 100),
    "guidance_scale": (float, 0, 100),
    "teacher_steps": (int, 1, 1000),
    "teacher_guidance_scale": (float, 0, 100),
    "resolution": (int, 8, MAX_SIDE),
}


@dataclass(frozen=True)
class Recommended:
    """What to sample a model with where the user says nothing; None is not said.

    `a | b` is what `b` says, and what `a` says where `b` says nothing.
    """

    sampler: str | None = None
    """One of `SAMPLERS`; one of `FEW_STEP_SAMPLERS` says that the model is distilled."""
    steps: int | None = None
    """The number of steps of a few-step sampler."""
    gamma: float | None = None
    """The share of fresh noise in each step of tcd."""
    original_steps: int | None = None
    """Timesteps that the distillation used, on which the steps lie."""
    shift: float | None = None
    """The shift of a rectified flow's timesteps."""
    guidance_scale: float | None = None
    """The guidance scale with a few-step sampler; 1 is off."""
    teacher_steps: int | None = None
    """The number of steps of any other sampler."""
    teacher_guidance_scale: float | None = None
    """The guidance scale with any other sampler."""
    resolution: int | None = None
    """Pixels along each side."""

    def __or__(self, other: Recommended) -> Recommended:
        return Recommended(**{**self.said, **other.said})

    @property
    def said(self) -> dict[str, Any]:
        """All that is said, by name: plain JSON values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def is_distilled(self) -> bool:
        """Whether the model is said to do with few steps."""
        return self.sampler in FEW_STEP_SAMPLERS

    @property
    def grid(self) -> dict[str, Any]:
        """What is said of the steps beyond their number, by the names that `Settings` has for it."""
        return {name: self.said[name] for name in ("gamma", "original_steps") if name in self.said}

    @property
    def remark(self) -> str:
        """`grid` and `shift` in words, behind a comma; empty where nothing is said."""
        words = {"gamma": "gamma {:g}", "original_steps": "{} original steps", "shift": "shift {:g}"}
        return "".join(f", {text.format(self.said[name])}" for name, text in words.items() if name in self.said)

    def __str__(self) -> str:
        return f"{self.sampler}{'' if self.steps is None else f', {self.steps} steps'}{self.remark}"

    def metadata(self) -> dict[str, str]:
        """What to write into a safetensors file."""
        return {RECOMMENDED_KEY: json.dumps(self.said)} if self.said else {}


def parse_recommended(values: Mapping[str, Any], where: str) -> Recommended:
    """The record in values that come from outside; names that it does not know are passed over.

    Args:
        values: by the names of `Recommended`.
        where: their place, for the message.

    Raises:
        InputError: a value of the wrong type or out of range.
    """
    known = {name: values[name] for name in ("sampler", *_LIMITS) if values.get(name) is not None}
    for name, value in known.items():
        if name == "sampler":
            good, allowed = isinstance(value, str) and value in SAMPLERS, ", ".join(SAMPLERS)
        else:
            kind, least, most = _LIMITS[name]
            typed = type(value) is kind or (kind is float and type(value) is int)
            good, allowed = typed and least <= value <= most, f"{least:g} to {most:g}"
        if not good:
            raise InputError(f"{where} states {name} {value!r:.60}; it must be {allowed}")
    return Recommended(**known)


def recommended_in(metadata: Mapping[str, str], name: str) -> Recommended:
    """What a safetensors file's metadata say; an empty record where they say nothing.

    Args:
        metadata: of the file.
        name: the file's, for the message.

    Raises:
        InputError: no JSON, or a value of the wrong type or out of range.
    """
    where = f"the metadata '{RECOMMENDED_KEY}' of {name}"
    return parse_recommended(parse_json(metadata.get(RECOMMENDED_KEY, "{}"), where, "export it again"), where)


def read_recommended(path: Path) -> Recommended:
    """What a file, or the scheduler's configuration of a diffusers folder, says.

    Raises:
        InputError: it cannot be read, or states what cannot be.
    """
    if path.is_file():
        return recommended_in(read_metadata(path), str(path))
    file = path / "scheduler" / "scheduler_config.json"
    content = read_json(file) if file.exists() else {}
    own = content.get(FOLDER_KEY, {})
    if not isinstance(own, dict):
        raise InputError(f"{path}: {FOLDER_KEY} of its scheduler holds no JSON object; get the model again")
    samplers = {scheduler: sampler for sampler, scheduler in SCHEDULERS.items()}
    by_class: dict[str, Any] = {}
    if (sampler := samplers.get(str(content.get("_class_name")))) is not None:
        by_class = {"sampler": sampler, "original_steps": content.get("original_inference_steps")}
    return parse_recommended(by_class | own, f"the scheduler of {path}")
