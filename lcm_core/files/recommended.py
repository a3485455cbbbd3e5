"""How a distilled model wants to be sampled, as its file states it: the trainer writes it, and all hosts follow it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lcm_core.errors import InputError
from lcm_core.files.reading import parse_json

Number = TypeVar("Number", int, float)

FEW_STEP_SAMPLERS = ("lcm", "tcd")
"""For distilled models: they walk the grid of `original_steps`."""
TEACHER_SAMPLERS = ("euler", "dpmpp_2m", "dpm_2m")
"""For plain models, 20 to 50 steps. "euler" is deterministic DDIM."""
SAMPLERS = FEW_STEP_SAMPLERS + TEACHER_SAMPLERS
MAX_SIDE = 8192
"""Pixels along one side."""

KIND_KEY = "lcm_suite.kind"
"""Safetensors metadata: which sampler a distilled model or LoRA was made for, lcm or tcd."""
STEPS_KEY = "lcm_suite.steps"
"""Alike: how many steps it is best at."""
GAMMA_KEY = "lcm_suite.gamma"
"""Alike: for tcd, the share of fresh noise in each step."""
ORIGINAL_STEPS_KEY = "lcm_suite.original_steps"
"""Alike: how many timesteps the distillation knew, where that is not the usual number; the steps lie on them."""
GUIDANCE_KEY = "lcm_suite.guidance_scale"
"""Alike: the guidance scale that a full LCM is used with where the user says nothing."""
SAMPLING_KEY = "lcm_suite.sampling"
"""Alike: JSON of all that is used where the user says nothing, by the names of `SAMPLING`."""
FOLDER_KEY = "_lcm_suite"
"""In scheduler_config.json of a diffusers folder: all of these. diffusers passes over names that begin so."""


SAMPLING: dict[str, tuple[type, float, float]] = {
    "sampler": (str, 0, 0),
    "steps": (int, 1, 1000),
    "gamma": (float, 0, 1),
    "guidance_scale": (float, 0, 100),
    "teacher_guidance_scale": (float, 0, 100),
    "teacher_steps": (int, 1, 1000),
    "original_steps": (int, 1, 1000),
    "resolution": (int, 8, MAX_SIDE),
    "is_distilled": (bool, 0, 1),
}
"""Defaults that a model may state, by their names in `loading.Model`: type, least and greatest value."""


@dataclass(frozen=True)
class Stated:
    """How a distilled model wants to be sampled; what is None is not said."""

    sampler: str
    """One of `FEW_STEP_SAMPLERS`."""
    steps: int | None = None
    gamma: float | None = None
    original_steps: int | None = None

    @property
    def options(self) -> dict[str, float]:
        """What is said beyond sampler and steps, by the names that `Settings` has for it."""
        said = {"gamma": self.gamma, "original_steps": self.original_steps}
        return {name: value for name, value in said.items() if value is not None}

    @property
    def sampling(self) -> dict[str, Any]:
        """All that is said, by the names that `SAMPLING` has for it."""
        steps = {} if self.steps is None else {"steps": self.steps}
        return {"sampler": self.sampler, **steps, **self.options}

    @property
    def remark(self) -> str:
        """The same in words, behind a comma; empty where nothing is said."""
        gamma = "" if self.gamma is None else f", gamma {self.gamma:g}"
        return gamma + ("" if self.original_steps is None else f", {self.original_steps} original steps")

    def __str__(self) -> str:
        steps = "" if self.steps is None else f", {self.steps} steps"
        return f"{self.sampler}{steps}{self.remark}"

    def metadata(self) -> dict[str, str]:
        """What to write into a file."""
        said = {
            KIND_KEY: self.sampler,
            STEPS_KEY: self.steps,
            GAMMA_KEY: self.gamma,
            ORIGINAL_STEPS_KEY: self.original_steps,
        }
        return {key: str(value) for key, value in said.items() if value is not None}


def read_stated(metadata: Mapping[str, str], name: str) -> Stated | None:
    """What a file's metadata state; None where they say nothing.

    Args:
        metadata: of a safetensors file.
        name: the file's, for the message.

    Raises:
        InputError: a number is none, or out of range.
    """
    sampler = metadata.get(KIND_KEY)
    if sampler not in FEW_STEP_SAMPLERS:
        return None
    return Stated(
        sampler,
        steps=_number(metadata, STEPS_KEY, int, 1, 1000, name),
        gamma=_number(metadata, GAMMA_KEY, float, 0, 1, name),
        original_steps=_number(metadata, ORIGINAL_STEPS_KEY, int, 1, 1000, name),
    )


def read_sampling(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """The defaults that a file's metadata state, by the names of `SAMPLING`; empty where they state none.

    Raises:
        InputError: no JSON, or a value of the wrong type or out of range.
    """
    where = f"the metadata '{SAMPLING_KEY}' of {name}"
    return check_sampling(parse_json(metadata.get(SAMPLING_KEY, "{}"), where, "export it again"), where)


def check_sampling(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Those of `values` that `SAMPLING` knows.

    Raises:
        InputError: a value of the wrong type or out of range.
    """
    known = {key: values[key] for key in SAMPLING if key in values}
    for key, value in known.items():
        kind, least, greatest = SAMPLING[key]
        good = type(value) is kind or (kind is float and type(value) is int)
        if kind is str:
            good = value in SAMPLERS
        if not good or (kind is not str and not least <= value <= greatest):
            allowed = ", ".join(SAMPLERS) if kind is str else f"{least:g} to {greatest:g}"
            raise InputError(f"{name} states {key} {value!r:.60}; it must be {allowed}")
    return known


def _number(
    metadata: Mapping[str, str], key: str, kind: Callable[[str], Number], lowest: float, highest: float, name: str
) -> Number | None:
    if key not in metadata:
        return None
    try:
        value = kind(metadata[key])
    except ValueError as error:
        raise InputError(f"{name}: {key} must be a number: {error}") from error
    if not lowest <= value <= highest:
        raise InputError(f"{name} states {key} {value:g}, which is out of range; it must be {lowest:g} to {highest:g}")
    return value
