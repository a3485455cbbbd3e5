"""Arrays and tensors as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lcm_core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image


def from_array(source: Any) -> Image:
    """A picture from an array (H, W) or (H, W, 3), or a tensor (H, W) or (3, H, W), also in a batch of one.

    Whole numbers are 0 to 255, fractions 0 to 1.

    Raises:
        InputError: another shape, or numbers out of range.
    """
    import numpy
    import torch
    from PIL import Image

    is_tensor = isinstance(source, torch.Tensor)
    array = source.detach().float().cpu().numpy() if is_tensor else numpy.asarray(source)
    whole = not source.dtype.is_floating_point if is_tensor else array.dtype.kind != "f"
    shape = tuple(source.shape)
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    array = array.transpose(1, 2, 0) if is_tensor and array.ndim == 3 else array
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    is_picture = array.size and (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3))
    scaled = array.astype(numpy.float64) * (1 if whole else 255) if is_picture and array.dtype.kind in "biuf" else None
    if scaled is None or not (scaled.min() >= 0 and scaled.max() <= 255):
        raise InputError(
            f"an array of shape {shape} cannot be used as a picture; give one picture, (H, W, 3), or as a tensor "
            "(3, H, W), in whole numbers from 0 to 255 or fractions from 0 to 1"
        )
    return Image.fromarray(scaled.round().astype(numpy.uint8))
