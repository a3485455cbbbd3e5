"""Variants of a picture: mirrored, cropped and recoloured, each computed once and cached like a picture of its own.

Variant 0 is the plain picture. What is random in another depends on its name, its number and the seed alone, so it is
the same on every machine and in every order of work. Colours are changed by kornia.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.pipeline.image import load_image
from trainer.data.buckets import Size, Window, choose_bucket, fit_window
from trainer.data.settings import DataConfig

if TYPE_CHECKING:
    from PIL.Image import Image


def make_variant(
    picture: Image, key: str, variant: int, buckets: list[Size], config: DataConfig
) -> tuple[Tensor, Window]:
    """One variant of a picture, (1, 3, H, W) in [-1, 1], and the window of the picture that it shows.

    Args:
        picture: decoded, of any mode.
        key: its name, which seeds what is random.
        variant: 0 for the plain picture; every odd one is mirrored where `config.flip` says so.
        buckets: sizes to choose from.
        config: which augmentations, how strong, and the seed.

    Raises:
        InputError: the picture is too thin for its bucket, or kornia is missing.
    """
    numbers = _random_numbers(config.teacher_seed, key, variant)
    keep, x, y = 1.0, 0.5, 0.5
    if variant and config.crop < 1:
        keep, x, y = config.crop + (1 - config.crop) * next(numbers), next(numbers), next(numbers)
    window = fit_window(picture.size, choose_bucket(picture.size, buckets), keep, x, y)
    image = load_image(picture.crop(window.box), window.target)
    if variant % 2 and config.flip:
        image, window = image.flip(-1), window.mirrored()
    if variant and config.colour:
        image = recolour(image, [(2 * next(numbers) - 1) * config.colour for _ in range(4)])
    return image, window


def recolour(image: Tensor, amounts: list[float]) -> Tensor:
    """Change brightness, contrast, saturation and hue, in this order, by shares in [-1, 1]; 0 changes nothing.

    Args:
        image: (B, 3, H, W) in [-1, 1].
        amounts: the four shares; a brightness of 0.1 adds a tenth of the whole range, a hue of 1 turns half the circle.

    Raises:
        InputError: kornia is missing.
    """
    enhance = load_kornia()
    brightness, contrast, saturation, hue = (float(amount) for amount in amounts)
    pixels = (image + 1) / 2
    pixels = enhance.adjust_brightness(pixels, brightness)
    pixels = enhance.adjust_contrast_with_mean_subtraction(pixels, 1 + contrast)
    pixels = enhance.adjust_saturation(pixels, 1 + saturation)
    pixels = enhance.adjust_hue(pixels, hue * torch.pi)
    return pixels.clamp(0, 1) * 2 - 1


def load_kornia() -> Any:
    """kornia's colour functions.

    Raises:
        InputError: kornia is missing.
    """
    try:
        from kornia import enhance
    except ImportError:
        raise InputError("colour augmentation needs kornia; `pip install kornia`, or leave colour out") from None
    return enhance


def _random_numbers(seed: int, key: str, variant: int) -> Iterator[float]:
    """Numbers in [0, 1) that belong to this variant of this picture."""
    name = f"{seed}/{variant}/{key}".encode("utf-8", "backslashreplace")
    start = int.from_bytes(hashlib.sha256(name).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(start)
    while True:
        yield float(torch.rand((), generator=generator))
