"""Textual inversions: files with learned token vectors, found in prompts by the file's name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.reading import check_text
from lcm_core.files.safetensors import PathLike, check_finite, read_safetensors

_ENCODERS = ("clip_l", "clip_g")
"""What files for SDXL call the vectors of its two encoders."""
_ASKED = re.compile(r"(?:^|(?<=[\s(\[|:,]))embedding:([^\s,()\[\]|:]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Inversion:
    """A learned word: for each text encoder its vectors (N, D)."""

    name: str
    vectors: tuple[Tensor, ...]


def read_inversion(path: PathLike, widths: Sequence[int]) -> Inversion:
    """A textual inversion in a .safetensors file, in the layouts of A1111, diffusers and kohya's scripts.

    Args:
        path: the file; its name without suffix is the word.
        widths: D of each of the model's text encoders.

    Raises:
        InputError: no such file, no inversion, or one for another kind of model.
    """
    file = Path(path)
    check_text("embedding", file.stem)
    if not file.stem.strip():
        raise InputError(f"embedding {os.fspath(path)!r} has no name; give a .safetensors file with one")
    stored, _ = read_safetensors(file)
    check_finite(stored, path)
    tensors = {key: value for key, value in stored.items() if value.is_floating_point()}
    found = [tensors[name] for name in _ENCODERS if name in tensors] or list(tensors.values())
    rows = [value.float().reshape(-1, value.shape[-1]) for value in found if value.ndim in (1, 2) and value.numel()]
    if [value.shape[-1] for value in rows] != list(widths):
        has = ", ".join(str(tuple(value.shape)) for value in found[:3]) or "none"
        wanted = " and ".join(map(str, widths))
        raise InputError(
            f"embedding {os.fspath(path)} does not fit: its vectors are {has}, this model's text encoder wants rows of "
            f"{wanted}; give a textual inversion made for this kind of model"
        )
    if len({len(value) for value in rows}) > 1:
        raise InputError(
            f"embedding {os.fspath(path)} has another number of vectors for each text encoder; get it again"
        )
    return Inversion(file.stem, tuple(rows))


def named(prompt: str, inversions: Mapping[str, Inversion]) -> str:
    """A prompt where ComfyUI's `embedding:name` is the name alone.

    Raises:
        InputError: an inversion of that name is not loaded.
    """
    names = {name.lower(): name for name in inversions}

    def name_of(match: re.Match[str]) -> str:
        asked = match[1].removesuffix(".safetensors")
        if asked.lower() not in names:
            known = ", ".join(sorted(names)) or "none"
            raise InputError(f"the prompt asks for embedding {asked[:60]!r}, which is not loaded (loaded: {known})")
        return names[asked.lower()]

    return _ASKED.sub(name_of, prompt)
