"""The tensors of a shard: what they are called, how they are put together, and the checksum of each row."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_core.errors import InputError
from trainer.data.items import Skipped

LATENTS, NUMBERS, TIME_IDS = "latents ", "numbers ", "time_ids "
"""A shard's tensors of each bucket, whose name (`64x48`, latent height and width) follows."""
HINTS, TOKENS, NO_TOKENS = "hints ", "tokens ", "no tokens "
"""What a bucket may have beside its latents: control pictures (N, 3, H, W) uint8; what an IP-Adapter makes of the
pictures, (N, T, D), and of none, as often."""
CHECKSUMS, TEXT_CHECKSUMS = "checksums ", "checksums"
"""What `row_checksum` gives of each row of a bucket's latents with what is beside them, and of each row of a shard of
text."""
SKIPPED = "skipped"
"""Tensor of a shard with the JSON list of [name, reason] of what could not be used; metadata has no fixed order."""
Beside = Mapping[str, Tensor]
"""What a picture has beside its latents, (1, ...), by the names of that."""


class Rows:
    """Latents of one shard, sorted by their size, in float16: what that rounds off is a thousandth of the noise that is
    added in the least noisy step.

    Args:
        exact: keep them as they are.
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact
        self._found: dict[tuple[int, int], list[_Group]] = {}

    def add(
        self,
        latents: Tensor,
        numbers: Sequence[int],
        time_ids: Sequence[Sequence[int]],
        beside: Sequence[Beside] = (),
    ) -> None:
        """Add (B, C, h, w) latents of pictures, and what each has beside them, where they have something.

        Raises:
            InputError: they are not finite.
        """
        if not bool(torch.isfinite(latents).all()):
            raise InputError("the teacher's networks gave NaN or infinity as latents; use another VAE or teacher")
        height, width = latents.shape[-2:]
        self._found.setdefault((height, width), []).append(_Group(latents, numbers, time_ids, beside))

    def tensors(self, skipped: Skipped) -> dict[str, Tensor]:
        """All of them as the tensors of a shard: for each size the latents, their pictures' numbers and time_ids, and
        what is beside them."""
        result = {SKIPPED: torch.frombuffer(bytearray(json.dumps(skipped).encode()), dtype=torch.uint8)}
        for (height, width), parts in self._found.items():
            size = f"{height}x{width}"
            rows = torch.cat([part.latents for part in parts])
            result[LATENTS + size] = rows if self.exact else small(rows)
            beside = [row for part in parts for row in part.beside]
            result |= {name + size: torch.cat([row[name] for row in beside]) for name in (beside[0] if beside else ())}
            result[CHECKSUMS + size] = torch.tensor(row_checksums(result, size))
            result[NUMBERS + size] = torch.tensor([n for part in parts for n in part.numbers])
            result[TIME_IDS + size] = torch.tensor([ids for part in parts for ids in part.time_ids], dtype=torch.int32)
        return result


class _Group(NamedTuple):
    """What was added at once."""

    latents: Tensor
    numbers: Sequence[int]
    time_ids: Sequence[Sequence[int]]
    beside: Sequence[Beside]


def picture_names(tensors: Mapping[str, Tensor], size: str) -> list[str]:
    """Names of what a shard holds of each picture of a bucket, in the order in which its checksum covers them."""
    return [name + size for name in (LATENTS, HINTS, TOKENS, NO_TOKENS) if name + size in tensors]


def row_checksums(tensors: Mapping[str, Tensor], size: str) -> list[int]:
    """The checksum of each row of a bucket."""
    names = picture_names(tensors, size)
    return [row_checksum([tensors[name][row] for name in names]) for row in range(len(tensors[names[0]]))]


def row_checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes of some tensors, in their order."""
    code = 0
    for tensor in tensors:
        data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        code = zlib.crc32(data, code)
    return code


def small(value: Tensor) -> Tensor:
    """A tensor in half its memory: float16, or bfloat16 where numbers are too large for that; no integers."""
    if not value.is_floating_point():
        return value
    fits = float(value.abs().max()) < torch.finfo(torch.float16).max
    return value.to(torch.float16 if fits else torch.bfloat16)
