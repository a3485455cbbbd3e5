"""Making the shards that are missing, without encoding again what an earlier cache in the same folder holds.

A cache of other pictures or captions is a folder of its own. But what stands in a row depends on one picture or caption
and on how it is encoded: where an earlier folder says the same of both, the row is copied, and only the others are
made. Copied rows are compared with their checksums first. A shard that an earlier folder has just as it is to be, like
all in front of what is added at the end, is linked: that takes no time, and no place on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_json, read_safetensors, write_json, write_safetensors
from trainer.data.rows import CHECKSUMS, LATENTS, NUMBERS, SKIPPED, TEXT_CHECKSUMS, row_checksum, row_checksums
from trainer.data.shards import Contents, Maker, Shards, is_unchanged, known_whole
from trainer.distributed import Processes

_KEYS, _FILE = "keys", "keys.safetensors"
_LENGTH = 16  # bytes of a key
Tensors = dict[str, Tensor]


class Place(NamedTuple):
    """Where an earlier cache has a thing."""

    shard: Path
    number: int
    """The thing's, there."""
    first: int
    """Number of the first thing in that shard."""
    size: int
    """How many things are in that shard."""


def fill(shards: Shards, load: Callable[[], Maker], processes: Processes, what: str) -> None:
    """Make this process's share of the shards that are missing or damaged. What earlier caches hold is copied; the
    networks are loaded only if something else is missing. What a thing took is kept in `speed.json`, for estimates."""
    if processes.is_main and shards.contents is not None and not (shards.folder / _FILE).exists():
        write_keys(shards.folder, shards.contents)
    mine = range(processes.rank, len(shards), processes.size)
    checked = tqdm(
        mine, desc=f"checking cached {what}", unit="file", delay=2, leave=False, disable=not processes.is_main
    )
    known = known_whole(shards.folder)
    missing = [i for i in checked if not is_unchanged(shards.path(i), known) and not shards.is_whole(i)]
    if not missing:
        return
    earlier = {} if shards.contents is None else find_earlier(shards.folder, shards.contents)
    make, made, started = cache(load), 0, time.monotonic()

    def make_rest(numbers: Sequence[int]) -> Tensors:
        nonlocal made
        made += len(numbers)
        return make()(numbers)

    total = sum(len(shards.numbers(index)) for index in missing)
    with tqdm(total=total, desc=f"caching {what}", unit=what[:-1], disable=not processes.is_main) as bar:
        for index in missing:
            if not link(shards, index, earlier):
                rows = earlier if shards.starts is None else {}  # else a thing is no row, but a shard
                write_safetensors(shards.path(index), gather(shards.numbers(index), rows, make_rest))
            bar.update(len(shards.numbers(index)))
    if processes.is_main and made and shards.starts is None:  # how long a tar takes says nothing of another
        write_json(shards.speed, {"seconds": (time.monotonic() - started) / (made * processes.size)})


def write_keys(folder: Path, contents: Contents) -> None:
    """Say in a folder what its rows are of, for caches that come later."""
    keys = torch.frombuffer(bytearray(b"".join(map(_hash, contents.keys()))), dtype=torch.uint8)
    write_safetensors(folder / _FILE, {_KEYS: keys.view(-1, _LENGTH)})


def find_earlier(folder: Path, contents: Contents) -> dict[int, Place]:
    """Where other folders beside this one have its things: number -> place. Damaged folders are passed over."""
    wanted: dict[bytes, int] = {}
    found: dict[int, Place] = {}
    for other in sorted(folder.parent.glob(f"{folder.name.partition('-')[0]}-*")):
        if other == folder or not (other / _FILE).is_file():
            continue
        try:
            about = read_json(other / "about.json")
            if not _says(about, contents.made_by):
                continue
            keys = read_safetensors(other / _FILE)[0][_KEYS].numpy()
        except (InputError, KeyError):
            continue
        wanted = wanted or {_hash(key): number for number, key in enumerate(contents.keys())}
        each = int(about["each"])
        for number, key in enumerate(keys):
            mine = wanted.get(key.tobytes())
            if mine is not None and mine not in found:
                first = number - number % each
                shard = other / f"{first // each:06d}.safetensors"
                found[mine] = Place(shard, number, first, min(each, len(keys) - first))
    return found


def link(shards: Shards, index: int, earlier: Mapping[int, Place]) -> bool:
    """Take a whole shard over from an earlier cache as it is. Returns whether that is done; else it is to be made.

    Not where something could not be used, which is tried again, nor where the file system has no hard links. A shard is
    never changed once it is written, so that two folders may have the same.
    """
    numbers, target = shards.numbers(index), shards.path(index)
    source = earlier.get(numbers[0])
    if source is None:
        return False
    if shards.starts is None:  # else a shard is the same wherever it comes
        if numbers != range(source.first, source.first + source.size):
            return False
        places = [earlier[number] for number in numbers if number in earlier]
        if places != [source._replace(number=number) for number in numbers]:
            return False
    try:
        target.unlink(missing_ok=True)  # a damaged one
        os.link(source.shard, target)
    except OSError:
        return False
    if not (is_unchanged(target, _known(source.shard.parent)) or shards.is_whole(index)):
        return False
    skipped = None if shards.starts is not None else _open(target).get(SKIPPED)
    return skipped is None or not json.loads(bytes(skipped.numpy()))


def gather(numbers: Sequence[int], earlier: Mapping[int, Place], make: Callable[[Sequence[int]], Tensors]) -> Tensors:
    """The tensors of a shard, of which earlier caches have some rows and `make` gives the others."""
    pieces: dict[int, Tensors] = {}
    for number in numbers:
        row = _row(earlier[number]) if number in earlier else None
        if row is not None:
            pieces[number] = {**row, **{name: torch.full_like(row[name], number) for name in row if _is_number(name)}}
    if not pieces:
        return make(numbers)
    fresh = [number for number in numbers if number not in pieces]
    made = make(fresh) if fresh else {}
    is_latents = any(name.startswith(LATENTS) for piece in pieces.values() for name in piece)
    joined = _join_latents([*pieces.values(), made]) if is_latents else _join_texts(numbers, pieces, fresh, made)
    return make(numbers) if joined is None else joined


def _join_latents(pieces: Sequence[Tensors]) -> Tensors:
    """In the order of the pictures, as `Rows` has them."""
    result = {SKIPPED: torch.frombuffer(bytearray(json.dumps([]).encode()), dtype=torch.uint8)}
    parts: dict[str, list[Tensor]] = {}
    for piece in pieces:
        for name, value in piece.items():
            parts.setdefault(name, []).append(value)
    result |= {name: torch.cat(values) for name, values in parts.items() if name != SKIPPED}
    result |= {name: values[-1] for name, values in parts.items() if name == SKIPPED}  # of those that were made
    for numbers in [name for name in result if _is_number(name)]:
        bucket = numbers.removeprefix(NUMBERS)
        order = result[numbers].argsort(stable=True)
        for name in [name for name in result if name.endswith(f" {bucket}")]:
            result[name] = result[name][order]
    return result


def _join_texts(
    numbers: Sequence[int], pieces: Mapping[int, Tensors], fresh: Sequence[int], made: Tensors
) -> Tensors | None:
    """In the order of the captions; None where they have different lengths, and must be padded together."""
    rows = {**pieces, **{number: {k: v[i : i + 1] for k, v in made.items()} for i, number in enumerate(fresh)}}
    forms = {tuple(sorted((name, value.shape, value.dtype) for name, value in row.items())) for row in rows.values()}
    if len(forms) != 1:
        return None
    return {name: torch.cat([rows[number][name] for number in numbers]) for name in rows[numbers[0]]}


def _row(place: Place) -> Tensors | None:
    """The tensors of one thing; None where it was skipped, or is not what was written."""
    try:
        tensors = _open(place.shard)
    except InputError:
        return None
    if TEXT_CHECKSUMS in tensors:
        at = place.number - place.first
        row = {name: value[at : at + 1] for name, value in tensors.items()}
        names = sorted(row.keys() - {TEXT_CHECKSUMS})
        return row if row_checksum([row[name][0] for name in names]) == int(row[TEXT_CHECKSUMS]) else None
    found: Tensors = {}
    for numbers in [name for name in tensors if _is_number(name)]:
        bucket = numbers.removeprefix(NUMBERS)
        here = tensors[numbers] == place.number
        if bool(here.any()):
            found |= {name: value[here] for name, value in tensors.items() if name.endswith(f" {bucket}")}
            if row_checksums(found, bucket) != found[CHECKSUMS + bucket].tolist():
                return None
    return found or None


def _is_number(name: str) -> bool:
    return name.startswith(NUMBERS)


@lru_cache(maxsize=8)
def _open(path: Path) -> Tensors:
    return read_safetensors(path)[0]


@lru_cache(maxsize=8)
def _known(folder: Path) -> dict[str, Any]:
    return known_whole(folder)


def _says(about: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether JSON values are in a file that may hold more."""
    for name, value in wanted.items():
        said = about.get(name)
        if isinstance(value, Mapping):
            if not isinstance(said, Mapping) or not _says(said, value):
                return False
        elif json.dumps(said) != json.dumps(value):
            return False
    return True


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:_LENGTH]
