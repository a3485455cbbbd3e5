"""The work behind the cache: from numbered pictures or captions to the tensors of one shard.

A shard depends on what is in it alone: not on which process makes it, nor on what was made before. Each kind of data
gives the same three things: its captions, what its latents depend on, and a function that makes a shard of latents.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.networks.conditioning import flatten
from lcm_core.networks.ip_adapter import IPAdapter
from lcm_core.pipeline.guides import seen_tokens
from trainer.data.augment import load_kornia, make_variant
from trainer.data.buckets import Window, make_buckets
from trainer.data.hashing import FileHashes, hash_json
from trainer.data.hints import read_hints
from trainer.data.items import Item, Skipped
from trainer.data.labels import read_labelled
from trainer.data.rows import HINTS, NO_TOKENS, TEXT_CHECKSUMS, TOKENS, Beside, Rows, row_checksum, small
from trainer.data.settings import DataConfig
from trainer.data.shards import FORMAT, Contents, Maker
from trainer.data.teacher import Teacher

if TYPE_CHECKING:
    from PIL.Image import Image

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


class Variant(NamedTuple):
    """What `make_variant` gave, and what goes with it."""

    image: Tensor
    window: Window
    beside: Beside


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
        self.hints = read_hints(config.control_pictures)
        self._sight: IPAdapter | None = None
        self.captions = [item.caption for item in self.source.items]
        self.repeats: Sequence[int] = [item.repeats for item in self.source.items]
        self.skipped = self.source.skipped

    def identity(self) -> dict[str, Any]:
        """Pictures, their names (which seed the augmentation), VAE, buckets and augmentation."""
        pictures = {
            "pictures": self.hashes.digest(self.source.files),
            "names": hash_json([item.key for item in self.source.items]),
            **self._made_by(),
        }
        if self.hints is not None:
            pictures["hint_files"] = hash_json(self.hints.hashes(self.source.items, self.hashes))
        return pictures | {name: value for name, value in self._kept_beside().items() if value is not None}

    def contents(self) -> Contents | None:
        """Of pictures in files of their own, or in tars: the file's contents, and the name, a seed."""
        files = [item.file for item in self.source.items]
        if None in files:
            return None

        def keys() -> list[str]:
            known = dict(zip(self.source.files, self.hashes.each(self.source.files), strict=True))
            seeds = [f"{known[item.file]} {item.key}" for item in self.source.items if item.file is not None]
            if self.hints is None:
                return seeds
            stated = self.hints.hashes(self.source.items, self.hashes)
            return [f"{seed} {hint}" for seed, hint in zip(seeds, stated, strict=True)]

        return Contents({"latents": self._made_by() | self._kept_beside(), "format": FORMAT}, keys)

    def _kept_beside(self) -> dict[str, str | None]:
        """What rows have beside their latents; None is not said, so that older caches are still found."""
        sight = self.teacher.hash_ip_adapter()
        return {"hints": "RGB" if self.hints is not None and not sight else None, "sight": sight or None}

    def _made_by(self) -> dict[str, Any]:
        config = self.config
        augmentation = [config.flip, config.crop, config.colour, config.teacher_seed] if config.is_augmented else []
        return {
            "vae": self.teacher.hash_vae(),
            "buckets": self.buckets,
            "augmentation": [config.variant_count, *augmentation],
        }

    def load(self, device: torch.device) -> Maker:
        """Load the VAE, and an IP-Adapter where there is one."""
        self._sight = self.teacher.open_ip_adapter(device)
        vae = self.teacher.open_vae(device, torch.float32)

        def make(numbers: Sequence[int]) -> dict[str, Tensor]:
            rows, skipped = Rows(), list[tuple[str, str]]()
            waiting: dict[tuple[int, int], list[tuple[int, Variant]]] = {}

            def encode(group: list[tuple[int, Variant]]) -> None:
                pixels = torch.cat([made.image for _, made in group]).to(vae.device)
                windows = [made.window.time_ids for _, made in group]
                beside = [made.beside for _, made in group if made.beside]
                rows.add(vae.encode(pixels).cpu(), [number for number, _ in group], windows, beside)

            for number, made in zip(numbers, ahead(self._variants, numbers), strict=True):
                if isinstance(made, InputError):
                    skipped.append((self.source.items[number].key, str(made)))
                    continue
                for variant in made:
                    target = variant.window.target
                    group = waiting.setdefault(target, [])
                    group.append((number, variant))
                    if len(group) == min(self.config.cache_batch, max(1, _PIXELS // variant.image[0, 0].numel())):
                        encode(waiting.pop(target))
            for group in waiting.values():
                encode(group)
            return rows.tensors(skipped)

        return make

    def _variants(self, number: int) -> list[Variant] | InputError:
        item, found = self.source.items[number], list[Variant]()
        try:
            picture = item.open()
            for variant in range(self.config.variant_count):
                made = make_variant(picture, item.key, variant, self.buckets, self.config)
                found.append(Variant(*made, self._beside(item, picture, variant)))
        except InputError as error:
            return error
        return found

    def _beside(self, item: Item, picture: Image, variant: int) -> Beside:
        """What a control looks at: a control picture, or what an IP-Adapter sees in it or in the picture itself."""
        if self._sight is not None:
            seen = picture if self.hints is None else self.hints.open(item)
            tokens, none = seen_tokens(self._sight, seen)
            return {TOKENS: small(tokens).cpu(), NO_TOKENS: small(none).cpu()}
        if self.hints is None:
            return {}
        return {HINTS: self.hints.variant(item, picture, variant, self.buckets, self.config)}


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
        tensors = {name: small(value).cpu() for name, value in flatten(cond).items() if name != TIME_IDS_NAME}
        rows = [[tensors[name][row] for name in sorted(tensors)] for row in range(len(numbers))]
        return {**tensors, TEXT_CHECKSUMS: torch.tensor([row_checksum(row) for row in rows])}

    return make


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
