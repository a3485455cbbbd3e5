"""The index of a cache: which rows of which shards a run learns from, with which captions; one small file.

It is all that has to be opened to train from a cache, however many pictures are in it: its tables are mapped from the
disk, and a batch touches as many of their rows as it has samples. It is made once, from the finished shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.safetensors import check_checksum, read_safetensors, write_safetensors
from trainer.data.hashing import hash_json
from trainer.data.items import Skipped
from trainer.data.rows import LATENTS, NUMBERS, SKIPPED, TIME_IDS
from trainer.data.shards import Shards

if TYPE_CHECKING:
    from trainer.data.cache import CachePlan

ROWS, HELD = "rows ", "held "
"""Tables of a bucket, whose name follows: (R, 3) of shard, row in it, and number of the caption's first version; of the
pictures to learn from, as often as each is to come, and of those that are held out."""
ABOUT = "about"
"""Tensor with JSON: all that is not a table."""
_EXAMPLES = 6  # captions from all over the data, for previews


def index_path(plan: CachePlan) -> Path:
    """Where a plan's index is; its name is a hash of what decides its contents."""
    config = plan.config
    identity = {
        "texts": plan.texts.folder.name,
        "captions": hash_json(plan.data.captions),
        "repeats": hash_json(list(plan.data.repeats)),
        "versions": config.caption_versions,
        "holdout": config.holdout,
    }
    return plan.latents.folder / f"index-{hash_json(identity)}.safetensors"


def find_index(path: Path) -> Path | None:
    """The index in the folder of a finished cache; None where the path is none.

    Raises:
        InputError: several; one of them is to be given itself.
    """
    if path.is_file():
        return path if path.name.startswith("index-") else None
    found = sorted(path.glob("latents-*/index-*.safetensors"))
    if len(found) > 1:
        raise InputError(f"{path} holds caches of {len(found)} data sets; give one of their files, such as {found[0]}")
    return found[0] if found else None


def read_index(file: Path, checked: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tables of an index, and what else it says.

    Args:
        file: from `index_path` or `find_index`.
        checked: whether it is known to be what was written; else all of it is read once.

    Raises:
        InputError: missing, damaged, or no index.
    """
    tensors, metadata = read_safetensors(file)
    if not checked:
        check_checksum(file, tensors, metadata)
    if ABOUT not in tensors:
        raise InputError(f"{file} is no index of a cache; give the folder that `python -m trainer cache` filled")
    return tensors, json.loads(bytes(tensors[ABOUT].numpy()))


def write_index(plan: CachePlan, file: Path) -> None:
    """Make the index of finished shards.

    Raises:
        InputError: no picture is left to learn from.
    """
    numbers, versions = {caption: i for i, caption in enumerate(plan.captions)}, plan.config.caption_versions
    total = len(plan.data.captions)
    caption_of = torch.tensor([numbers[caption] * versions for caption in plan.data.captions])
    repeats = torch.tensor(list(plan.data.repeats) or [1] * total)
    held = torch.zeros(total, dtype=torch.bool)
    count = min(plan.config.holdout, total)
    held[[i * total // count for i in range(count)]] = True  # from all over the data
    tables, skipped, enlarged = _scan(plan.latents, caption_of, torch.where(held, 0, repeats), held)
    skipped = [*plan.data.skipped, *skipped]
    if not any(name.startswith(ROWS) for name in tables):
        if not tables:
            raise InputError(f"none of {len(skipped)} pictures can be used (first: {': '.join(skipped[0])})")
        raise InputError(f"holdout {count} leaves no picture to learn from; use less")
    spoken = [caption for caption in plan.captions if caption] or [""]
    shown = min(_EXAMPLES, len(spoken))
    about = {
        "texts": plan.texts.folder.name,
        "texts_each": plan.texts.each,
        "shards": len(plan.latents),
        "captions": len(plan.captions) - 1,
        "versions": versions,
        "latent_channels": plan.teacher.latent_channels,
        "examples": [spoken[i * len(spoken) // shown] for i in range(shown)],
        "skipped": skipped,
        "notes": _notes(plan.data.captions, skipped, enlarged),
        "contents": [plan.hash_pictures(), plan.hash_captions()],
        "made_by": plan.teacher.hash_encoders(),
        "data": {name: value for name, value in asdict(plan.config).items() if name != "cache"},  # where it lies
    }
    tables[ABOUT] = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
    write_safetensors(file, tables)


def _scan(latents: Shards, caption_of: Tensor, repeats: Tensor, held: Tensor) -> tuple[dict[str, Tensor], Skipped, int]:
    """The tables of all shards, what these say is skipped, and how many pictures are enlarged."""
    parts: dict[str, list[Tensor]] = {}
    skipped: Skipped = []
    enlarged: set[int] = set()
    for shard in range(len(latents)):
        tensors = read_safetensors(latents.path(shard))[0]
        skipped += [(name, reason) for name, reason in json.loads(bytes(tensors[SKIPPED].tolist()))]
        for bucket in (name.removeprefix(LATENTS) for name in tensors if name.startswith(LATENTS)):
            numbers = tensors[NUMBERS + bucket] + (latents.starts[shard] if latents.starts else 0)
            rows = torch.arange(len(numbers))
            table = torch.stack([torch.full_like(rows, shard), rows, caption_of[numbers]], 1).to(torch.int32)
            parts.setdefault(ROWS + bucket, []).append(table.repeat_interleave(repeats[numbers], 0))
            parts.setdefault(HELD + bucket, []).append(table[held[numbers]])
            original, target = tensors[TIME_IDS + bucket][:, :2], tensors[TIME_IDS + bucket][:, 4:]
            small = (original < target).any(1)  # what is cropped to the target's shape must be enlarged
            enlarged.update(numbers[small].tolist())
    # the order decides what a seed draws, and must not depend on how many pictures a shard holds
    tables = {name: torch.cat(tables) for name, tables in sorted(parts.items())}
    return {name: table for name, table in tables.items() if len(table)}, skipped, len(enlarged)


def _notes(captions: list[str], skipped: Skipped, enlarged: int) -> list[str]:
    notes = []
    if enlarged:
        notes.append(
            f"{enlarged} of {len(captions)} pictures are smaller than what is trained on and are enlarged, which the "
            "student learns too; give larger ones, or a smaller --resolution"
        )
    if without := captions.count(""):
        notes.append(
            f"{without} of {len(captions)} pictures have no caption and are learnt with the empty prompt; "
            "put captions into cat.txt beside cat.jpg, or into metadata.jsonl"
        )
    if skipped:
        name, reason = skipped[0]
        notes.append(f"{len(skipped)} skipped (first: {name}: {reason}); skipped.json names all")
    return notes


def check_unchanged(about: Mapping[str, Any], settings: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Refuse settings of the data that a finished cache was not made with and could not follow.

    Args:
        about: from `read_index`.
        settings, usual: those asked for, and their defaults.

    Raises:
        InputError: names the first.
    """
    while_training = ("path", "prompts", "cache", "caption_dropout", "null_prompt", "cache_batch")
    for name, value in settings.items():
        if name not in while_training and value not in (usual[name], about["data"].get(name)):
            raise InputError(
                f"{name} {value} was given, but the cache was made with {about['data'].get(name)}; give the pictures "
                "as data, or leave it out"
            )
