"""The main colour of a drawing, and the same drawing in another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HUES = {"red": 0.0, "orange": 30.0, "yellow": 52.0, "green": 120.0, "blue": 215.0, "purple": 280.0, "pink": 330.0}
"""Colour word -> hue in degrees."""
COLOURFUL_SHARE, AGREEMENT = 0.3, 0.85
"""A drawing has one colour if this share of it is colourful, and its hues agree so well (1: all are the same)."""
_TO_OPPONENT = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1.0, -0.5, -0.5], [0.0, math.sqrt(0.75), -math.sqrt(0.75)]])
"""Red, green, blue -> lightness, and the plane in which hue is an angle and 0 the direction of red."""


def main_hue(drawing: Tensor) -> float | None:
    """Hue in degrees of a drawing (4, S, S), float in [0, 255]; None where it has no or several colours."""
    colour = _chroma(drawing)
    strength = colour.abs()
    opaque = drawing[3].sum()
    if float(strength.sum()) < COLOURFUL_SHARE * float(opaque):
        return None
    mean = colour.sum() / strength.sum()
    return math.degrees(float(mean.angle())) % 360 if float(mean.abs()) > AGREEMENT else None


def recolour(drawing: Tensor, name: str) -> Tensor:
    """A drawing (4, S, S), float in [0, 255], with all hues turned so that its main one becomes the colour `name`."""
    turn = math.radians(HUES[name]) - float(_chroma(drawing).sum().angle())
    light, one, two = torch.einsum("ij,jhw->ihw", _TO_OPPONENT, drawing[:3])
    cos, sin = math.cos(turn), math.sin(turn)
    turned = torch.stack([light, cos * one - sin * two, sin * one + cos * two])
    colours = torch.einsum("ij,jhw->ihw", torch.linalg.inv(_TO_OPPONENT), turned)
    return torch.cat([torch.minimum(colours.clamp(min=0), drawing[3:]), drawing[3:]])


def _chroma(drawing: Tensor) -> Tensor:
    """Complex (S, S): how colourful each pixel is (of 255) as length, its hue as angle."""
    _, one, two = torch.einsum("ij,jhw->ihw", _TO_OPPONENT, drawing[:3])
    return torch.complex(one, two)
