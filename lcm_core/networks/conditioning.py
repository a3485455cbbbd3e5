"""What networks are given beside samples: nested dicts of tensors, stacked from texts of different lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Conditioning = dict[str, Any]


def flatten(conditioning: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Nested conditioning as one dict with dotted names."""
    flat: dict[str, Tensor] = {}
    for name, value in conditioning.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def nest(flat: Mapping[str, Tensor]) -> Conditioning:
    """What `flatten` was given."""
    nested: Conditioning = {}
    for name, value in flat.items():
        place, *rest = name.split(".")
        if rest:
            nested.setdefault(place, {})[".".join(rest)] = value
        else:
            nested[place] = value
    return {name: nest(value) if isinstance(value, dict) else value for name, value in nested.items()}


def stack_rows(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Samples' tensors (L, ...) as batches (B, L, ...); shorter ones get zeros behind them, masks False."""
    return {name: torch.stack(_alike([row[name] for row in rows])) for name in rows[0]}


def pad_alike(a: Conditioning, b: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Two batches of conditioning (B, L, ...) with texts of one length, so that they can run as one."""
    first, second = flatten(a), flatten(b)
    for name in first:
        if first[name].ndim > 1 and first[name].shape[1] != second[name].shape[1]:
            length = max(first[name].shape[1], second[name].shape[1])
            first[name], second[name] = (_padded(value, 1, length) for value in (first[name], second[name]))
    return nest(first), nest(second)


def repeat_alike(*conditionings: Conditioning) -> list[Conditioning]:
    """Batches (B, L, ...) of CLIP's states with texts of one length: shorter ones are repeated.

    Attention to keys and values that are all repeated equally often is attention to them once, so nothing changes.
    """
    flat = [flatten(conditioning) for conditioning in conditionings]
    for name, value in flat[0].items():
        lengths = [row[name].shape[1] for row in flat] if value.ndim > 2 else [1]
        for row in flat if len(set(lengths)) > 1 else ():
            row[name] = row[name].repeat(1, math.lcm(*lengths) // row[name].shape[1], 1)
    return [nest(row) for row in flat]


def _alike(values: Sequence[Tensor]) -> list[Tensor]:
    if values[0].ndim == 0 or len({value.shape[0] for value in values}) == 1:
        return list(values)
    length = max(value.shape[0] for value in values)
    return [_padded(value, 0, length) for value in values]


def _padded(value: Tensor, dim: int, length: int) -> Tensor:
    behind = (value.ndim - 1 - dim) * (0, 0)
    return functional.pad(value, (*behind, 0, length - value.shape[dim]))
