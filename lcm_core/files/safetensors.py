"""Safetensors and JSON files in and out, with one clear line for every way in which they can be broken. No pickles."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
from lcm_core.files.reading import JSON_LIMIT, is_plain_name, open_file, parse_json, read_json

PathLike = str | os.PathLike[str]
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
CHECKSUM_KEY = "lcm_suite.checksum"
"""Safetensors metadata of all files that `write_safetensors` made: what `checksum` gave. The format has none."""
_OWN_METADATA = "lcm_suite."
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_HEADER_LIMIT = JSON_LIMIT  # bytes; the format itself would allow more than fits into memory when it is parsed


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
    stated = {"format": "pt", **(metadata or {})}
    stated[CHECKSUM_KEY] = checksum(ready, stated)
    with atomic_write(path) as temporary:
        try:
            save_file(ready, temporary, metadata=stated)
        except SafetensorError as error:  # how the writer reports a full disk
            raise InputError(f"cannot write {path}: {error}; free some space or choose another output path") from error


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of all tensors (names, dtypes, shapes, bytes) and of this suite's own metadata, as 8 hexadecimal digits.

    Any single flipped bit changes it. Other programs may add metadata of their own. About 3 GB per second.
    """
    own = {k: v for k, v in metadata.items() if k.startswith(_OWN_METADATA) and k != CHECKSUM_KEY}
    layout = [(key, str(tensors[key].dtype), list(tensors[key].shape)) for key in sorted(tensors)]
    code = zlib.crc32(json.dumps([layout, sorted(own.items())]).encode())
    for key, *_ in layout:
        data = tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        values: Any = data.numpy()
        code = zlib.crc32(values, code)
    return f"{code:08x}"


def check_checksum(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise InputError when a file states a checksum that its content does not have; pass where it states none."""
    stated = metadata.get(CHECKSUM_KEY)
    if stated is not None and stated != checksum(tensors, metadata):
        raise InputError(
            f"{path} is damaged, or another program changed it (its checksum is not {stated}); make or get it again"
        )


def check_finite(tensors: Mapping[str, Tensor], source: PathLike) -> None:
    """Raise InputError when a weight is NaN or infinite: such a model paints black or noise without a word."""
    for key, value in tensors.items():
        if not value.is_floating_point() or value.element_size() == 1:
            continue
        # the sum is one quick pass and carries NaN; only if it is odd, or overflows, is a closer look needed
        if not torch.isfinite(value.sum(dtype=torch.float32)) and not torch.isfinite(value).all():
            raise InputError(f"{source}: weight '{key}' is NaN or infinite; the file is broken, use another copy")


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights of one network's folder: diffusers' or transformers' name, its half precision or 8-bit
    variant, or in shards.

    Raises:
        InputError: as `read_safetensors`; there are none; or they are not what was written.
    """
    return {key: value for file in _weights_files(folder) for key, value in _read_checked(file).items()}


def _read_checked(file: Path) -> dict[str, Tensor]:
    tensors, metadata = read_safetensors(file)
    check_checksum(file, tensors, metadata)
    return tensors


def int8_variant(name: str) -> str:
    """The name of the same weights in 8 bits, in diffusers' way of naming variants; it would misread them."""
    return name.replace(".safetensors", ".int8.safetensors")


def _weights_files(folder: Path) -> list[Path]:
    for stem in (DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS):
        for name in (stem, stem.replace(".safetensors", ".fp16.safetensors"), int8_variant(stem)):
            if (folder / name).is_file():
                return [folder / name]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return [folder / shard for shard in _shards(index)]
    for pickle in sorted(p for p in folder.iterdir() if p.suffix in _PICKLES):
        check_file(pickle)
    raise InputError(f"{folder} holds no weights ({DIFFUSERS_WEIGHTS} or {TRANSFORMERS_WEIGHTS}); give a model folder")


def _shards(index: Path) -> list[str]:
    """The files that an index names, which must lie beside it."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{index} has no weight_map from weights to files; get the model folder again")
    for name in files.values():
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise InputError(f"{index} names {name!r}, which is no .safetensors file beside it; get the model again")
    return sorted(set(files.values()))


def write_json(path: PathLike, content: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_file(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, after checks that tell a user what is wrong with it.

    `__metadata__`, where there is one, is texts by name.
    """
    broken = f"{file} is not a safetensors file; download or export it again"
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        start, brace = stream.read(8), stream.read(1)
        # a header of 640 bytes begins as a pickle does, but only a header goes on with a brace behind its length
        if file.suffix.lower() in _PICKLES or (start.startswith(_PICKLE_STARTS) and brace != b"{"):
            raise InputError(
                f"{file} is a pickle, which can run code when it is opened; convert it where you trust it: "
                "torch.load(file, weights_only=True), then safetensors.torch.save_file"
            )
        length = int.from_bytes(start, "little")
        if size < 8 or length > _HEADER_LIMIT:
            raise InputError(broken)
        if length > size - 8:
            raise InputError(f"{file} is truncated ({size:,} bytes); download or export it again")
        text = brace + stream.read(max(length - 1, 0))
    try:
        header = parse_json(text, str(file))
    except InputError as error:
        raise InputError(broken) from error
    _check_header(file, header, size - 8 - length)
    return header


def _check_header(file: Path, header: Mapping[str, Any], held: int) -> None:
    entries = [value for key, value in header.items() if key != "__metadata__"]
    stated = header.get("__metadata__", {})
    if not all(isinstance(entry, dict) and _are_offsets(entry.get("data_offsets")) for entry in entries) or not (
        isinstance(stated, dict) and all(isinstance(value, str) for value in stated.values())
    ):
        raise InputError(f"{file} is not a safetensors file; download or export it again")
    needed = max((entry["data_offsets"][1] for entry in entries), default=0)
    if held < needed:
        raise InputError(f"{file} is truncated ({held:,} of {needed:,} bytes of weights); download or export it again")


def _are_offsets(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int and number >= 0 for number in value)
