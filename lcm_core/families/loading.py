"""Loading a family's networks from a diffusers folder, through diffusers' and transformers' own classes. Safetensors
only, and never from the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import check_finite
from lcm_core.files.configurations import check_config
from lcm_core.files.safetensors import read_folder, read_json

_LOCAL = {"local_files_only": True, "use_safetensors": True}


def load_network(kind: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """One of diffusers' networks, frozen and in evaluation mode.

    Args:
        kind: name of its class.
        folder: with config.json and weights.

    Raises:
        InputError: a weight is missing, left over, of another shape or not finite; or this diffusers has no such class.
    """
    check_config(read_json(folder / "config.json"), str(folder / "config.json"))
    check_finite(read_folder(folder), folder)
    model, info = _load("diffusers", kind, folder, torch_dtype=dtype, output_loading_info=True, **_LOCAL)
    for what, names in (("lacks", info["missing_keys"]), ("has too many", info["unexpected_keys"])):
        if names:
            raise InputError(
                f"{folder} {what} {len(names)} weights for its configuration (first: '{min(names)}'); "
                "get the model again"
            )
    return model.to(device).eval().requires_grad_(False)


def load_text_pipeline(
    pipeline: str, encoders: dict[str, str], root: Path, device: torch.device, dtype: torch.dtype
) -> Any:
    """diffusers' pipeline of a model with its tokenizers and text encoders alone, to encode prompts with.

    Args:
        pipeline: name of its class.
        encoders: folder of each text encoder -> transformers' class. One without a folder is left out.
        root: of the model.

    Raises:
        InputError: a folder is broken.
    """
    parts: dict[str, Any] = {}
    for name, kind in encoders.items():
        there = (root / name).is_dir()
        words = name.replace("text_encoder", "tokenizer")
        parts[words] = _load("transformers", "AutoTokenizer", root / words, local_files_only=True) if there else None
        encoder = _load("transformers", kind, root / name, dtype=dtype, **_LOCAL) if there else None
        parts[name] = None if encoder is None else encoder.to(device).eval().requires_grad_(False)
    if all(part is None for part in parts.values()):
        raise InputError(f"{root} has no {' or '.join(encoders)} folder; get the model again")
    return find_class("diffusers", pipeline)(**parts, transformer=None, vae=None, scheduler=None)


def _load(library: str, kind: str, folder: Path, **options: Any) -> Any:
    cls = find_class(library, kind)
    try:
        return cls.from_pretrained(folder, **options)
    except Exception as error:  # the libraries' reasons are many, and of many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{folder} cannot be loaded as {kind} ({reason}); get the model again") from error


def find_class(library: str, kind: str) -> Any:
    """A class of diffusers' or transformers' by its name.

    Raises:
        InputError: the installed version does not have it.
    """
    import importlib

    module = importlib.import_module(library)
    if not hasattr(module, kind):
        raise InputError(f"this version of {library} ({module.__version__}) has no {kind}; install a newer one")
    return getattr(module, kind)
