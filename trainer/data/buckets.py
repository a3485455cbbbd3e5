"""Aspect-ratio buckets: a few picture sizes of about one area, and the window of a picture that fills its bucket."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lcm_core.errors import InputError
from lcm_core.pipeline.settings import check_size

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Window:
    """What of a picture is kept, in its own pixels, and what that means for SDXL.

    `box` (left, top, right, bottom) is scaled to `target`; `crop` is its (top, left) corner after scaling.
    """

    original: Size
    target: Size
    box: tuple[int, int, int, int]

    @property
    def crop(self) -> tuple[int, int]:
        """(top, left) of the target inside the scaled picture."""
        left, top, right, bottom = self.box
        return round(top * self.target[1] / (bottom - top)), round(left * self.target[0] / (right - left))

    @property
    def time_ids(self) -> tuple[int, ...]:
        """What SDXL is told of the picture (arXiv 2307.01952 Sec. 2.2): original height and width, crop's top and left,
        target's height and width."""
        (width, height), (target_width, target_height) = self.original, self.target
        return (height, width, *self.crop, target_height, target_width)

    def mirrored(self) -> Window:
        """The same part of the mirror image."""
        left, top, right, bottom = self.box
        width = self.original[0]
        return replace(self, box=(width - right, top, width - left, bottom))


def make_buckets(resolution: int, multiple: int, max_aspect: float = 2.0) -> list[Size]:
    """Sizes with sides that are multiples of `multiple`, at most resolution^2 pixels, and as many as fit.

    Args:
        resolution: side of the square bucket.
        multiple: what the teacher's VAE and U-Net divide by together.
        max_aspect: long side by short side, at most; 1 leaves the square alone.

    Raises:
        InputError: a resolution that the teacher cannot take.
    """
    check_size(resolution, resolution, multiple)
    buckets = set()
    for width in range(multiple, int(resolution * math.sqrt(max_aspect)) + 1, multiple):
        height = resolution * resolution // width // multiple * multiple
        if height and max(width, height) <= max_aspect * min(width, height):
            buckets |= {(width, height), (height, width)}
    return sorted(buckets)


def choose_bucket(size: Size, buckets: list[Size]) -> Size:
    """The bucket of the nearest shape; of two, the one with more pixels."""
    aspect = math.log(size[0] / size[1])
    return min(buckets, key=lambda b: (round(abs(math.log(b[0] / b[1]) - aspect), 9), -b[0] * b[1], b))


def fit_window(original: Size, target: Size, keep: float = 1.0, x: float = 0.5, y: float = 0.5) -> Window:
    """The largest window of the target's shape, shrunk to `keep` of its sides.

    Args:
        original: (width, height) of the picture.
        target: (width, height) of its bucket.
        keep: 1 keeps as much as the shape allows.
        x, y: where the window lies in the room that is left, 0 (left, top) to 1.

    Raises:
        InputError: a picture so thin that nothing of the shape is left.
    """
    scale = keep * min(original[0] / target[0], original[1] / target[1])
    width, height = (min(round(side * scale), whole) for side, whole in zip(target, original, strict=True))
    if not width or not height:
        raise InputError(f"the picture of {original[0]}x{original[1]} pixels is too thin for training; crop it")
    left, top = round((original[0] - width) * x), round((original[1] - height) * y)
    return Window(original, target, (left, top, left + width, top + height))
