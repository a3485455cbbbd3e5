"""The encoder of pictures: from decoded pictures to the rows of a shard of latents."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.networks.ip_adapter import IPAdapter
from lcm_core.pipeline.guides import seen_tokens
from trainer.data.augment import load_kornia, make_variant
from trainer.data.buckets import Window, make_buckets
from trainer.data.hints import read_hints
from trainer.data.items import Item
from trainer.data.rows import HINTS, NO_TOKENS, TOKENS, Beside, Rows, small
from trainer.data.settings import DataConfig
from trainer.data.teacher import Teacher

if TYPE_CHECKING:
    from PIL.Image import Image

_THREADS = 8
_PIXELS = 1 << 20  # that the VAE encodes at once, at most: 4 pictures of 512 x 512; in float32 they take some GB
In = TypeVar("In")
Out = TypeVar("Out")
Encode = Callable[[Iterable[tuple[int, Item]]], dict[str, Tensor]]
"""A function from numbered pictures to the tensors of their shard; it takes few of them at once."""


class Variant(NamedTuple):
    """What `make_variant` gave, and what goes with it."""

    image: Tensor
    window: Window
    beside: Beside


class Encoder:
    """Augmentation and the VAE, and what a control looks at beside the latents.

    The VAE runs in float32, and its mean is taken: this happens once, and every later step learns from it.

    Raises:
        InputError: the resolution, or the control pictures, cannot be used.
    """

    def __init__(self, config: DataConfig, teacher: Teacher) -> None:
        self.config, self.teacher = config, teacher
        side = config.resolution or teacher.resolution
        self.buckets = make_buckets(
            side, teacher.multiple, config.max_aspect if config.buckets and teacher.takes_any_shape else 1.0
        )
        if config.colour:
            load_kornia()
        self.hints = read_hints(config.control_pictures)
        self._sight: IPAdapter | None = None

    def kept_beside(self) -> dict[str, str | None]:
        """What rows have beside their latents; None is not said, so that older caches are still found."""
        sight = self.teacher.hash_ip_adapter()
        return {"hints": "RGB" if self.hints is not None and not sight else None, "sight": sight or None}

    def made_by(self) -> dict[str, Any]:
        """All that latents depend on but the pictures, as plain JSON values."""
        config = self.config
        augmentation = [config.flip, config.crop, config.colour, config.teacher_seed] if config.is_augmented else []
        return {
            "vae": self.teacher.hash_vae(),
            "buckets": self.buckets,
            "augmentation": [config.variant_count, *augmentation],
        }

    def load(self, device: torch.device) -> Encode:
        """Load the VAE, and an IP-Adapter where there is one."""
        self._sight = self.teacher.open_ip_adapter(device)
        vae = self.teacher.open_vae(device, torch.float32)

        def encode_all(items: Iterable[tuple[int, Item]]) -> dict[str, Tensor]:
            rows, skipped = Rows(), list[tuple[str, str]]()
            waiting: dict[tuple[int, int], list[tuple[int, Variant]]] = {}

            def encode(group: list[tuple[int, Variant]]) -> None:
                pixels = torch.cat([made.image for _, made in group]).to(vae.device)
                windows = [made.window.time_ids for _, made in group]
                beside = [made.beside for _, made in group if made.beside]
                rows.add(vae.encode(pixels).cpu(), [number for number, _ in group], windows, beside)

            for number, key, made in ahead(self._prepared, items):
                if isinstance(made, InputError):
                    skipped.append((key, str(made)))
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

        return encode_all

    def _prepared(self, numbered: tuple[int, Item]) -> tuple[int, str, list[Variant] | InputError]:
        number, item = numbered
        return number, item.key, self._variants(item)

    def _variants(self, item: Item) -> list[Variant] | InputError:
        found = list[Variant]()
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
