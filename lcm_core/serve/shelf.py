"""The models and LoRAs that clients may choose, by name; the chosen model stays loaded until another one is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.errors import InputError
from lcm_core.networks.device import is_large
from lcm_core.networks.traced import trace_calls
from lcm_core.networks.unet import UNet
from lcm_core.serve.fields import RequestError

if TYPE_CHECKING:
    from lcm_core.pipeline import Pipeline

Loras = Sequence[tuple[str, float]]
Loader = Callable[..., "Pipeline"]
_TINY = "tiny"


@dataclass(frozen=True)
class Choice:
    """A model that may be chosen."""

    path: str
    unet: str | None = None
    """Which network of a shipped model."""
    own_loras: tuple[str, ...] = ()
    """LoRAs in the model's folder, by their names."""


Key = tuple[Choice, tuple[tuple[str, float], ...]]
"""A model, and the LoRAs in it with their strengths."""


@dataclass(frozen=True)
class _Loaded:
    """The model in memory."""

    key: Key
    full: Pipeline
    draft: Pipeline
    """The same networks with the tiny VAE; `full` where there is none."""


class Shelf:
    """Models by name. Clients never give paths, so that no request can make the server open another file."""

    def __init__(self, models: Mapping[str, Choice], loras: Mapping[str, Path], load: Loader) -> None:
        self.models = models
        self.loras = loras
        self.usual = next(iter(models))
        """The model of a request that names none."""
        self._load = load
        self._loaded: _Loaded | None = None
        self._lock = threading.Lock()

    def check(self, model: str, loras: Loras) -> None:
        """Refuse names that are not on the shelf.

        Raises:
            RequestError: names those that are.
        """
        if model not in self.models:
            raise RequestError(f"model {model[:60]!r} is unknown; use {_listed(self.models)}", 404)
        for name, _ in loras:
            if name not in self.lora_names(model):
                raise RequestError(f"LoRA {name[:60]!r} is unknown; use {_listed(self.lora_names(model))}", 404)

    def lora_names(self, model: str) -> list[str]:
        """LoRAs that may be added to a model."""
        return sorted({*self.models[model].own_loras, *self.loras})

    def has_small(self, model: str, loras: Loras = ()) -> bool:
        """Whether that model is in memory, on the CPU, and so small that one picture does not use all cores well."""
        loaded = self._loaded
        if loaded is None or loaded.key != (self.models[model], tuple(loras)):
            return False
        parts = loaded.full.model
        return parts.device.type == "cpu" and isinstance(parts.unet, UNet) and not is_large(parts.unet.model)

    def pipeline(self, model: str, loras: Loras = (), draft: bool = False) -> Pipeline:
        """The loaded model, for a draft with its tiny VAE where it has one. Another model is let go first, so that two
        are never in memory together.

        Raises:
            InputError: a file that cannot be used.
        """
        choice = self.models[model]
        key = (choice, tuple(loras))
        with self._lock:
            if self._loaded is None or self._loaded.key != key:
                self._loaded = None
                self._loaded = self._open(key)
            return self._loaded.draft if draft else self._loaded.full

    def _open(self, key: Key) -> _Loaded:
        choice, loras = key
        paths = [(str(self.loras.get(name, name)), strength) for name, strength in loras]
        loaded = self._load(choice.path, unet=choice.unet, lora=paths)
        if isinstance(loaded.model.unet, UNet):
            trace_calls(loaded.model.unet)
        return _Loaded(key, loaded, _with_tiny_vae(loaded, choice))


def find_models(first: str, folder: Path | None) -> dict[str, Choice]:
    """The model that was asked for, the embedded one, and all in `folder`, by their names.

    Raises:
        InputError: the first is unknown, or the folder is none.
    """
    from lcm_core.pipeline.sources import CARD, SHIPPED_UNETS, find_model

    found: dict[str, Choice] = {}
    for path in dict.fromkeys([first, "emoji", *map(str, _models_in(folder))]):
        root = find_model(path)
        own = tuple(file.stem for file in sorted((root / "lora").glob("*.safetensors")))
        if not (root / CARD).is_file():
            found.setdefault(root.stem if root.is_file() else root.name, Choice(path, own_loras=own))
            continue
        for unet in SHIPPED_UNETS:  # the LoRA is a teacher's
            name = root.name if unet == "lcm" else f"{root.name} ({unet})"
            found.setdefault(name, Choice(path, unet, () if unet == "lcm" else own))
    return found


def find_loras(folder: Path | None) -> dict[str, Path]:
    """LoRA files in a folder, by their names.

    Raises:
        InputError: the folder is none.
    """
    return {} if folder is None else {path.stem: path for path in _files(folder)}


def _with_tiny_vae(loaded: Pipeline, choice: Choice) -> Pipeline:
    """The same networks with the model's own tiny VAE; as it is where there is none, or the user chose a VAE."""
    from lcm_core.pipeline import Pipeline
    from lcm_core.pipeline.parts import open_vae
    from lcm_core.pipeline.sources import find_source, find_vae

    model, source = loaded.model, find_source(choice.path, choice.unet)
    if "vae" in model.origin or not find_vae(_TINY, source.root).is_dir():
        return loaded
    vae = open_vae(source, model.device, model.vae.dtype, path=_TINY)
    return Pipeline(replace(model, vae=vae, origin={**model.origin, "vae": _TINY}))


def _models_in(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    return [*_files(folder), *sorted(path.parent for path in folder.glob("*/model_index.json"))]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one that holds .safetensors files")
    return sorted(folder.glob("*.safetensors"))


def _listed(names: Any) -> str:
    shown = list(names)
    return ", ".join(map(repr, shown[:10])) + ", ..." * (len(shown) > 10) if shown else "none"
