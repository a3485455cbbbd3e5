"""Class-conditional models: their labels by name, in the place that text encoders have in other models."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_json

INDEX = "model_index.json"
_LISTED = 12  # names in one message


class ClassLabels:
    """Names of classes as labels.

    Attributes:
        names: every name of a class -> its label; several names may stand for one class.
        null: the label of no class, which guidance leads away from; None where the model has none.
        encoders: none that a LoRA could be merged into.
    """

    encoders: Sequence[Any] = ()

    def __init__(self, names: Mapping[str, int], null: int | None, device: torch.device) -> None:
        self.names, self.null, self.device = dict(names), null, device

    def encode(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, weighted: bool = False
    ) -> dict[str, Tensor]:
        """`class_labels` (B,) of names, or of numbers as text; an empty one stands for no class.

        Raises:
            InputError: there is no such class.
        """
        return {"class_labels": torch.tensor([self.number(name) for name in prompts], device=self.device)}

    def number(self, name: str) -> int:
        """The label of a class.

        Raises:
            InputError: there is no such class; the message names those that there are.
        """
        if not name:
            if self.null is None:
                raise InputError(
                    "this model has no label for no class, which guidance, a dropped label and an empty class need; "
                    "name a class, and use guidance 1"
                )
            return self.null
        if name in self.names:
            return self.names[name]
        if name.isdecimal() and int(name) in self.names.values():
            return int(name)
        near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.5)
        shown = near or list(self.names)[:_LISTED]
        more = "" if near or len(self.names) <= _LISTED else f" and {len(self.names) - _LISTED} more"
        raise InputError(f"this model has no class {name[:60]!r}; choose one of {', '.join(shown)}{more}")

    def clear_cache(self) -> None:
        """Nothing is kept."""


def read_labels(root: Path, classes: int, count: int, device: torch.device) -> ClassLabels:
    """The labels of a diffusers folder, by `id2label` in its index; without that, their numbers are their names.

    Args:
        root: the folder.
        classes: how many there are, where nothing names them.
        count: labels that the network knows. The one behind those of the classes, if there is one, stands for none.
        device: where labels go.

    Raises:
        InputError: the index names labels that the network does not have.
    """
    index = read_json(root / INDEX) if (root / INDEX).is_file() else {}
    stated = index.get("id2label") or {str(number): str(number) for number in range(classes)}
    where = f"{root / INDEX}: id2label"
    if not isinstance(stated, dict) or not all(isinstance(words, str) for words in stated.values()):
        raise InputError(f"{where} must be an object of numbers and names; get the model again")
    names: dict[str, int] = {}
    for key, words in stated.items():
        if not (key.isdecimal() and int(key) < count):
            raise InputError(f"{where} names the label {key[:60]!r}, the network has 0 to {count - 1}; get it again")
        names |= {word.strip(): int(key) for word in words.split(",") if word.strip()}
    first = len(stated)
    return ClassLabels(names, first if first < count else None, device)
