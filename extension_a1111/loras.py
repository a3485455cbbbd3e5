"""LoRAs in a prompt, and what a LoRA or checkpoint was made for: by what its file states, else by its names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from lcm_core.files.recommended import Recommended, recommended_in
from lcm_core.files.safetensors import check_file

Kind = Literal["lcm", "tcd"]
"""Which sampler an accelerated model was made for."""
_IN_PROMPT = re.compile(r"<(?:lora|lyco):([^:>]+)(?::([^>]*))?>", re.IGNORECASE)
_TITLES = ("modelspec.title", "ss_output_name")
# Hyper-SD and the like are trajectory-consistent: their authors sample with TCD.
_WORDS: dict[str, Kind] = {"lcm": "lcm", "tcd": "tcd", "hyper": "tcd"}


class Accelerated(NamedTuple):
    """A LoRA or checkpoint for few steps."""

    name: str
    recommended: Recommended
    """How it wants to be sampled; from its name alone only with which sampler."""


@dataclass(frozen=True)
class PromptLora:
    """One `<lora:name:strength>`."""

    name: str
    strength: str
    """The strength as it is written; the host reads it."""


def find_loras(prompt: str) -> list[PromptLora]:
    """The LoRAs of a prompt, in order; those switched off by strength 0 are left out."""
    found = [PromptLora(match[1].strip(), (match[2] or "1").strip()) for match in _IN_PROMPT.finditer(prompt)]
    return [lora for lora in found if lora.strength.split(":")[0] not in ("0", "0.0")]


def kind_of_name(*titles: str) -> Kind | None:
    """What a file's names say that it is for; None for an ordinary model."""
    words = {word for title in titles for word in re.findall(r"[a-z]+", title.lower())}
    return next((kind for word, kind in _WORDS.items() if word in words), None)


def read_accelerated(name: str, file: Path | None) -> Accelerated | None:
    """What a LoRA or checkpoint was made for, by what its file states, else by its name (in the prompt) and its titles.
    None for an ordinary one.

    Raises:
        InputError: the file is broken, or states what cannot be.
    """
    titles = [name]
    if file is not None and file.suffix == ".safetensors":
        metadata = check_file(file).get("__metadata__", {})
        if (said := recommended_in(metadata, file.name)).is_distilled:
            return Accelerated(name, said)
        titles += [file.stem, *(metadata.get(key, "") for key in _TITLES)]
    kind = kind_of_name(*titles)
    return None if kind is None else Accelerated(name, Recommended(kind))
