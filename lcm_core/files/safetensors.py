"""Safetensors and JSON files in and out, with one clear line for every way in which they can be broken. No pickles."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write

PathLike = str | os.PathLike[str]
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


def read_safetensors(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file. Its tensors are mapped from the disk, so those that nobody uses cost nothing.

    Returns:
        The tensors on the CPU in their stored dtype, and the file's metadata.

    Raises:
        InputError: missing, a pickle, truncated, or not a safetensors file.
    """
    file = Path(path)
    check_file(file)
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            names = opened.keys()
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{file} is not a readable safetensors file ({error}); download or export it again") from error


def read_metadata(path: PathLike) -> dict[str, str]:
    """The metadata of a safetensors file alone. Errors as in `read_safetensors`."""
    file = Path(path)
    return check_file(file).get("__metadata__", {})


def write_safetensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    ready = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(ready, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # how the writer reports a full disk
            raise InputError(f"cannot write {path}: {error}; free some space or choose another output path") from error


def check_finite(tensors: Mapping[str, Tensor], source: PathLike) -> None:
    """Raise InputError when a weight is NaN or infinite: such a model paints black or noise without a word."""
    for key, value in tensors.items():
        if not value.is_floating_point() or value.element_size() == 1:
            continue
        # the sum is one quick pass and carries NaN; only if it is odd, or overflows, is a closer look needed
        if not torch.isfinite(value.sum(dtype=torch.float32)) and not torch.isfinite(value).all():
            raise InputError(f"{source}: weight '{key}' is NaN or infinite; the file is broken, use another copy")


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights of one network's folder: diffusers' or transformers' name, half precision variant, or in shards."""
    for stem in (DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS):
        for name in (stem, stem.replace(".safetensors", ".fp16.safetensors")):
            if (folder / name).is_file():
                return read_safetensors(folder / name)[0]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index)["weight_map"].values()))
            return {key: value for shard in shards for key, value in read_safetensors(folder / shard)[0].items()}
    for pickle in sorted(p for p in folder.iterdir() if p.suffix in _PICKLES):
        check_file(pickle)
    raise InputError(f"{folder} holds no weights ({DIFFUSERS_WEIGHTS} or {TRANSFORMERS_WEIGHTS}); give a model folder")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give a complete model folder") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); get the model folder again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object; get the model folder again")
    return content


def write_json(path: PathLike, content: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_file(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, after checks that tell a user what is wrong with it."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(8)
            if file.suffix.lower() in _PICKLES or start.startswith(_PICKLE_STARTS):
                raise InputError(
                    f"{file} is a pickle, which can run code when it is opened; convert it where you trust it: "
                    "torch.load(file, weights_only=True), then safetensors.torch.save_file"
                )
            length = int.from_bytes(start, "little")
            if size < 8 or length > _HEADER_LIMIT:
                raise InputError(f"{file} is not a safetensors file; download or export it again")
            header = json.loads(stream.read(length)) if length <= size - 8 else None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; check the path") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is not a safetensors file; download or export it again") from error
    _check_length(file, header, size - 8 - length)
    assert header is not None
    return header


def _check_length(file: Path, header: dict[str, Any] | None, held: int) -> None:
    try:
        ends = [] if header is None else [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{file} is not a safetensors file; download or export it again") from error
    needed = max(ends, default=0)
    if header is None or held < needed:
        raise InputError(f"{file} is truncated ({held:,} of {needed:,} bytes of weights); download or export it again")
