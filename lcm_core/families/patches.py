"""Latents as rows of patches of 2 x 2, which some families take for tokens."""

from __future__ import annotations

from torch import Tensor

_ROWS, _LATENTS = "b (h w) (c p q)", "b c (h p) (w q)"


def to_patches(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h / 2 * w / 2, 4 C)."""
    from einops import rearrange

    return rearrange(latents, f"{_LATENTS} -> {_ROWS}", p=2, q=2)


def from_patches(rows: Tensor, height: int) -> Tensor:
    """The way back; `height` in patches."""
    from einops import rearrange

    return rearrange(rows, f"{_ROWS} -> {_LATENTS}", h=height, p=2, q=2)
