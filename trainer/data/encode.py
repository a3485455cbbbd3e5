"""The work behind the cache: from numbered pictures or captions to the tensors of one shard.

A shard depends on what is in it alone: not on which process makes it, nor on what was made before. Each kind of data
gives the same three things: its captions, what its latents depend on, and a function that makes a shard of latents.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.networks.conditioning import flatten
from trainer.data.augment import load_kornia, make_variant
from trainer.data.buckets import Window, make_buckets
from trainer.data.hashing import FileHashes, hash_json
from trainer.data.items import Skipped
from trainer.data.labels import read_labelled
from trainer.data.settings import DataConfig
from trainer.data.shards import FORMAT, Contents, Maker
from trainer.data.teacher import Teacher

LATENTS, NUMBERS, TIME_IDS = "latents ", "numbers ", "time_ids "
"""A shard's tensors of each bucket, whose name (`64x48`, latent height and width) follows."""
CHECKSUMS, TEXT_CHECKSUMS = "checksums ", "checksums"
"""The checksums of each row of a bucket's latents, and of each row of a shard of text: what `row_checksum` gave."""
SKIPPED = "skipped"
"""Tensor of a shard with the JSON list of [name, reason] of what could not be used; metadata has no fixed order."""
TIME_IDS_NAME = "added_cond_kwargs.time_ids"
"""Part of SDXL's conditioning that is a picture's, not its caption's."""
_THREADS = 8
_PIXELS = 1 << 20  # that the VAE encodes at once, at most: 4 pictures of 512 x 512; in float32 they take some GB
In = TypeVar("In")
Out = TypeVar("Out")


class Data(Protocol):
    """Numbered pictures, each with a caption; or what stands for pictures."""

    captions: list[str]
    """The captions of all pictures, by number."""
    repeats: Sequence[int]
    """How often each picture comes, by number; none for once."""
    skipped: Skipped
    """(name, reason) of what was found to be of no use before anything was decoded."""

    def identity(self) -> dict[str, Any]:
        """All that the latents depend on, as plain JSON values."""

    def contents(self) -> Contents | None:
        """What each row of the latents is of; None where that is not known."""

    def load(self, device: torch.device) -> Maker:
        """Load the networks that make latents."""


class Images:
    """Pictures that go through augmentation and the VAE.

    The VAE runs in float32, and its mean is taken: this happens once, and every later step learns from it.

    Raises:
        InputError: the data or the resolution cannot be used.
    """

    def __init__(self, config: DataConfig, teacher: Teacher, hashes: FileHashes) -> None:
        self.config, self.teacher, self.hashes = config, teacher, hashes
        side = config.resolution or teacher.resolution  # before the data, which may take long to list
        self.buckets = make_buckets(
            side, teacher.multiple, config.max_aspect if config.buckets and teacher.takes_any_shape else 1.0
        )
        if config.colour:
            load_kornia()
        self.source = read_labelled(Path(config.path), config.labels, teacher.labels, config.folder_names)
        self.captions = [item.caption for item in self.source.items]
        self.repeats: Sequence[int] = [item.repeats for item in self.source.items]
        self.skipped = self.source.skipped

    def identity(self) -> dict[str, Any]:
        """Pictures, their names (which seed the augmentation), VAE, buckets and augmentation."""
        return {
            "pictures": self.hashes.digest(self.source.files),
            "names": hash_json([item.key for item in self.source.items]),
            **self._made_by(),
        }

    def contents(self) -> Contents | None:
        """Of pictures in files of their own, or in tars: the file's contents, and the name, a seed."""
        files = [item.file for item in self.source.items]
        if None in files:
            return None

        def keys() -> list[str]:
            known = dict(zip(self.source.files, self.hashes.each(self.source.files), strict=True))
            return [f"{known[item.file]} {item.key}" for item in self.source.items if item.file is not None]

        return Contents({"latents": self._made_by(), "format": FORMAT}, keys)

    def _made_by(self) -> dict[str, Any]:
        config = self.config
        augmentation = [config.flip, config.crop, config.colour, config.teacher_seed] if config.is_augmented else []
        return {
            "vae": self.teacher.hash_vae(),
            "buckets": self.buckets,
            "augmentation": [config.variant_count, *augmentation],
        }

    def load(self, device: torch.device) -> Maker:
        """Load the VAE."""
        vae = self.teacher.open_vae(device, torch.float32)

        def make(numbers: Sequence[int]) -> dict[str, Tensor]:
            rows, skipped = Rows(), list[tuple[str, str]]()
            waiting: dict[tuple[int, int], list[tuple[int, Tensor, Window]]] = {}

            def encode(group: list[tuple[int, Tensor, Window]]) -> None:
                pixels = torch.cat([image for _, image, _ in group]).to(vae.device)
                windows = [window.time_ids for _, _, window in group]
                rows.add(vae.encode(pixels).cpu(), [number for number, _, _ in group], windows)

            for number, made in zip(numbers, ahead(self._variants, numbers), strict=True):
                if isinstance(made, InputError):
                    skipped.append((self.source.items[number].key, str(made)))
                    continue
                for image, window in made:
                    group = waiting.setdefault(window.target, [])
                    group.append((number, image, window))
                    if len(group) == min(self.config.cache_batch, max(1, _PIXELS // image[0, 0].numel())):
                        encode(waiting.pop(window.target))
            for group in waiting.values():
                encode(group)
            return rows.tensors(skipped)

        return make

    def _variants(self, number: int) -> list[tuple[Tensor, Window]] | InputError:
        item = self.source.items[number]
        try:
            picture = item.open()
            return [
                make_variant(picture, item.key, variant, self.buckets, self.config)
                for variant in range(self.config.variant_count)
            ]
        except InputError as error:
            return error


class Rows:
    """Latents of one shard, sorted by their size, in float16: what that rounds off is a thousandth of the noise that is
    added in the least noisy step.

    Args:
        exact: keep them as they are.
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        self._found: dict[tuple[int, int], list[tuple[Tensor, Sequence[int], Sequence[Sequence[int]]]]] = {}

    def add(self, latents: Tensor, numbers: Sequence[int], time_ids: Sequence[Sequence[int]]) -> None:
        """Add (B, C, h, w) latents of pictures.

        Raises:
            InputError: they are not finite.
        """
        if not bool(torch.isfinite(latents).all()):
            raise InputError("the teacher's networks gave NaN or infinity as latents; use another VAE or teacher")
        height, width = latents.shape[-2:]
        self._found.setdefault((height, width), []).append((latents, numbers, time_ids))

    def tensors(self, skipped: Skipped) -> dict[str, Tensor]:
        """All of them as the tensors of a shard: for each size the latents, their pictures' numbers and time_ids."""
        result = {SKIPPED: torch.frombuffer(bytearray(json.dumps(skipped).encode()), dtype=torch.uint8)}
        for (height, width), parts in self._found.items():
            size = f"{height}x{width}"
            rows = torch.cat([latents for latents, _, _ in parts])
            result[LATENTS + size] = rows = rows if self.exact else _small(rows)
            result[CHECKSUMS + size] = torch.tensor([row_checksum([row]) for row in rows])
            result[NUMBERS + size] = torch.tensor([n for _, numbers, _ in parts for n in numbers])
            result[TIME_IDS + size] = torch.tensor([row for _, _, rows in parts for row in rows], dtype=torch.int32)
        return result


def text_maker(captions: Sequence[str], teacher: Teacher, device: torch.device) -> Maker:
    """Load the text encoders. Shards hold conditioning (N, ...) by its dotted names, but for what depends on pictures.

    In float16, which halves the disk and is finer than the bfloat16 that large networks compute in; in that itself
    where a language model's states are too large for it.
    """
    precision = torch.float32 if teacher.source.family is None else None
    text = teacher.open_text(device, precision)
    told = False

    def make(numbers: Sequence[int]) -> dict[str, Tensor]:
        with warnings.catch_warnings(record=True) as cut:
            warnings.simplefilter("always")
            cond = text.encode([captions[number] for number in numbers])
        nonlocal told
        if cut and not told:  # once for all captions, not once for each
            warnings.warn(f"some captions are too long and lose their ends; the first: {cut[0].message}", stacklevel=2)
            told = True
        tensors = {name: _small(value).cpu() for name, value in flatten(cond).items() if name != TIME_IDS_NAME}
        rows = [[tensors[name][row] for name in sorted(tensors)] for row in range(len(numbers))]
        return {**tensors, TEXT_CHECKSUMS: torch.tensor([row_checksum(row) for row in rows])}

    return make


def row_checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes of some tensors, in their order."""
    code = 0
    for tensor in tensors:
        data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        code = zlib.crc32(data, code)
    return code


def _small(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    fits = float(value.abs().max()) < torch.finfo(torch.float16).max
    return value.to(torch.float16 if fits else torch.bfloat16)


def ahead(function: Callable[[In], Out], values: Iterable[In]) -> Iterator[Out]:
    """`map` in threads, in order, some values ahead of the one that is asked for; memory does not grow with all.

    Decoding and scaling photographs takes longer than a GPU takes to encode them.
    """
    threads = min(_THREADS, _count_cores())
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Any] = deque()
        for value in values:
            waiting.append(pool.submit(function, value))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
