"""Pictures in tars that are read once, from end to end, as they come over the network.

Each tar becomes one shard of latents, with the list of its captions. What is in memory at a time is a few pictures, and
the latents of one tar. A tar that the store says is unchanged is not read again, wherever it stands among the others.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from trainer.data.items import LONE_CAPTION, OTHER_PICTURES, PICTURES, Item, Skipped, decode, other_kind
from trainer.data.labels import check_label, column_of, folder_of
from trainer.data.pictures import Encoder
from trainer.data.remote import RemoteStream, RemoteTar
from trainer.data.rows import SKIPPED
from trainer.data.settings import DataConfig
from trainer.data.shards import Contents, Maker, Shards
from trainer.data.tars import DAMAGES, check_length, damage, parse_caption, split_name, text_suffixes
from trainer.data.teacher import Teacher

LISTED = "captions"
"""Tensor of a shard with the JSON list of the captions of its pictures, whose numbers count from 0 in each shard."""
_READ = 1 << 20  # bytes at once
_LARGEST = 1 << 28  # bytes of a picture


class Streamed:
    """Pictures whose latents, captions, and reasons to be skipped, are in the shards of their tars: a kind of
    `trainer.data.encode.Data`."""

    def __init__(self, shards: Shards) -> None:
        self.shards, self.captions = shards, list[str]()
        self.repeats: Sequence[int] = ()
        self.skipped: Skipped = []
        starts = []
        for index in range(len(shards)):
            starts.append(len(self.captions))
            listed = read_safetensors(shards.path(index))[0][LISTED]
            self.captions += json.loads(bytes(listed.numpy()))
        shards.starts = starts

    def identity(self) -> dict[str, Any]:
        """That of the shards."""
        return dict(self.shards.identity)

    def contents(self) -> Contents | None:
        """Those of the shards."""
        return self.shards.contents

    def load(self, device: torch.device) -> Maker:
        """Not needed: they are there."""
        raise RuntimeError("the shards of streamed pictures are made while the tars are read")


def streaming(tars: Sequence[RemoteTar], config: DataConfig, teacher: Teacher, device: torch.device) -> Maker:
    """Load the networks that make latents. What comes back takes the number of a tar, and reads that tar."""
    encoder = Encoder(config, teacher)
    encode = encoder.load(device)

    def make(numbers: Sequence[int]) -> dict[str, Tensor]:
        [number] = numbers
        skipped, captions = Skipped(), list[str]()
        with RemoteStream(tars[number]) as stream:
            items = read_labelled_stream(cast(IO[bytes], stream), tars[number].name, config, teacher, skipped)
            shown = tqdm(items, desc=tars[number].name, unit="picture", delay=2, leave=False)
            tensors = encode(_numbered(shown, captions))
        unusable = [*skipped, *json.loads(bytes(tensors[SKIPPED].numpy()))]
        return {**tensors, SKIPPED: _json(unusable), LISTED: _json(captions)}

    return make


def read_labelled_stream(
    stream: IO[bytes], name: str, config: DataConfig, teacher: Teacher, skipped: Skipped
) -> Iterator[Item]:
    """The pictures of a tar with their captions or classes, as `read_labelled` lists those that are here.

    Raises:
        InputError: as `read_stream`; or a class that the teacher does not know.
    """
    column, by_folder = column_of(config.labels, teacher.labels)
    known = set[str]()
    for item in read_stream(stream, name, column, skipped):
        labelled = replace(item, caption=folder_of(item.key)) if by_folder else item
        if teacher.labels is not None and labelled.caption not in known:
            check_label(labelled.caption, teacher.labels, name)
            known.add(labelled.caption)
        yield labelled


def read_stream(stream: IO[bytes], name: str, column: str, skipped: Skipped) -> Iterator[Item]:
    """The pictures of a tar in their order, each with its bytes. Of a damaged tar, those before the damage.

    Args:
        stream: of the tar, from its beginning.
        name: of the tar.
        column: as of `read_tars`.
        skipped: gets what cannot be used.

    Raises:
        InputError: the connection broke, or the members of a sample do not follow each other.
    """
    stem, members, seen = "", dict[str, _Member](), set[str]()
    wanted = (*PICTURES, *text_suffixes(column), *OTHER_PICTURES)
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_READ) as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"] = []  # which would all be kept
                own, suffix = split_name(member.name)
                if not (own and member.isreg() and suffix in wanted):
                    continue
                if own != stem:
                    yield from _samples(members, name, stem, column, skipped)
                    if own in seen:
                        raise InputError(
                            f"{name} has the members of {own} apart from each other, so that it cannot be read as a "
                            "stream; write it with its members sorted by name, or give it as a local file"
                        )
                    stem, members = own, {}
                    seen.add(own)
                members[suffix] = _read(tar, member, name, suffix)
    except InputError:
        raise
    except DAMAGES as error:
        members = {}  # the last of them may be incomplete
        skipped.append((name, damage(max(0, len(seen) - 1), error)))
    yield from _samples(members, name, stem, column, skipped)


class _Member(NamedTuple):
    """A member's name and bytes, or why these are not wanted."""

    name: str
    data: bytes
    reason: str = ""


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, suffix: str) -> _Member:
    key = f"{name}/{member.name}"
    if suffix in OTHER_PICTURES:
        return _Member(key, b"", other_kind(member.name))
    try:
        if suffix not in PICTURES:
            check_length(member.size, key)
        elif member.size > _LARGEST:
            raise InputError(f"{member.size:,} bytes are too many for a picture; scale it down")
    except InputError as error:
        return _Member(key, b"", str(error))
    content = tar.extractfile(member)
    assert content is not None
    data = content.read()
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return _Member(key, data)


def _samples(members: dict[str, _Member], name: str, stem: str, column: str, skipped: Skipped) -> Iterator[Item]:
    """The one item of a group of members, or none, and why."""
    picture = next((members[suffix] for suffix in PICTURES if suffix in members), None)
    text = next((members[suffix] for suffix in text_suffixes(column) if suffix in members), None)
    if picture is None:
        other = next((members[suffix] for suffix in OTHER_PICTURES if suffix in members), None)
        if other is not None:
            skipped.append((other.name, other.reason))
        elif text is not None:
            skipped.append((f"{name}/{stem}", LONE_CAPTION))
        return
    try:
        for member in filter(None, (picture, text)):
            if member.reason:
                raise InputError(member.reason)
        caption = "" if text is None else parse_caption(text.data, text.name, column)
    except InputError as error:
        skipped.append((picture.name, str(error)))
        return
    yield Item(picture.name, caption, partial(decode, picture.data, picture.name))


def _numbered(items: Iterator[Item], captions: list[str]) -> Iterator[tuple[int, Item]]:
    """Items with their numbers, whose captions are kept."""
    for number, item in enumerate(items):
        captions.append(item.caption)
        yield number, item


def _json(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
