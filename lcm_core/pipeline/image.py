"""Pictures in and out: tensors and Pillow images, settings kept inside the file, labelled grids.

Every writer encodes in memory and hands the bytes to `atomic_write`, so the same input gives the same bytes and a full
disk leaves nothing behind.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
from lcm_core.files.reading import open_file, parse_json

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    Fit = Callable[[Image, "tuple[int, int] | None"], Image]

StoredSettings = Mapping[str, Any]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SETTINGS_KEY = "lcm_suite"
"""Name of the PNG text chunk that holds the settings as JSON."""

_PARAMETERS = {
    "Steps": "num_inference_steps",
    "Sampler": "sampler",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Model": "model",
}
SAMPLER_NAMES = {"lcm": "LCM", "tcd": "TCD", "euler": "Euler", "dpmpp_2m": "DPM++ 2M", "dpm_2m": "DPM 2M"}
"""What the web UIs call the samplers."""
_PNG_LIMIT = 2**20 - 2**10  # bytes; Pillow refuses to read a longer text
_EXIF_LIMIT = 2**16 - 2**10  # bytes; a JPEG's segment has 64 KB, and other tags need some
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "TGA")
"""Kinds of pictures that are opened. Pillow would run another program for some others."""
_MOST_PIXELS = 100_000_000  # of an input picture; each takes up to 12 bytes while it is converted
_EXIF_DESCRIPTION = 0x010E  # JPEG and WebP have no text chunks; the image description carries the same JSON


# --- between tensors and pictures -------------------------------------------------------------------------------------


def to_pil(images: Tensor) -> list[Image]:
    """(B, 3, H, W) in [-1, 1] to B RGB pictures; values outside are clipped."""
    import torch
    from einops import rearrange
    from PIL import Image

    pixels = (images.detach().float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(array) for array in rearrange(pixels, "b c h w -> b h w c").cpu().numpy()]


def load_image(source: Any, size: tuple[int, int] | None = None, fit: Fit | None = None) -> Tensor:
    """A file or picture to (1, 3, H, W) in [-1, 1]: EXIF orientation applied, transparency laid on white.

    `size` is (width, height); the picture is scaled to cover it and cropped about its centre, by `fit` where given.

    Raises:
        InputError: the file is missing or is no picture.
    """
    return _to_tensor((fit or _fit)(_flatten(open_image(source), "white"), size)) * 2 - 1


def load_mask(source: Any, size: tuple[int, int] | None = None) -> Tensor:
    """A file or picture to a mask (1, 1, H, W) in [0, 1]: white is painted anew, black (or transparent) is kept.

    Raises:
        InputError: the file is missing or is no picture.
    """
    return _to_tensor(_fit(_flatten(open_image(source), "black").convert("L"), size))


def open_image(source: Any, most_pixels: int = _MOST_PIXELS) -> Image:
    """Open and fully decode a picture, turned as its EXIF orientation says.

    Args:
        source: a path, an open stream, a Pillow picture, an array (H, W) or (H, W, 3), or a tensor (3, H, W), the last
            two also in a batch of one; whole numbers are 0 to 255, fractions 0 to 1.
        most_pixels: of a file.

    Raises:
        InputError: the file is missing, is no picture, or has more than `most_pixels`.
    """
    from PIL import Image, ImageOps

    if isinstance(source, Image.Image):
        return source
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        from lcm_core.pipeline.arrays import from_array

        return from_array(source)
    Image.init()
    try:
        # bytes that are in memory already come as an open stream
        with nullcontext(source) if hasattr(source, "read") else open_file(source) as stream:
            image = Image.open(stream, formats=[name for name in _FORMATS if name in Image.OPEN])
            if image.width * image.height > most_pixels:
                raise InputError(f"picture {source} has {image.width}x{image.height} pixels; make it smaller first")
            return ImageOps.exif_transpose(image)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise whatever comes out of a broken file
        raise InputError(f"cannot read {source} as a picture ({error}); give a PNG, JPEG or WebP file") from error


def _flatten(image: Image, background: str) -> Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit greys would be clipped to white by convert()
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")


def _fit(image: Image, size: tuple[int, int] | None) -> Image:
    from PIL import Image, ImageOps

    if size is None or image.size == size:
        return image
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def _to_tensor(image: Image) -> Tensor:
    import numpy
    import torch
    from einops import rearrange

    array = torch.from_numpy(numpy.array(image, dtype=numpy.float32) / 255)  # (H, W) or (H, W, 3)
    return rearrange(array, "h w ... -> 1 (...) h w").contiguous()


# --- stills with their settings ---------------------------------------------------------------------------------------


def save_image(image: Image, path: str | os.PathLike[str], settings: StoredSettings | None = None) -> None:
    """Write a PNG, JPEG or WebP (by suffix) with `settings` inside; `read_settings` gives them back.

    A PNG also gets the `parameters` text that the common web UIs read.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    write_bytes(path, encode_image(image, Path(path).suffix, settings))


def encode_image(image: Image, suffix: str, settings: StoredSettings | None = None) -> bytes:
    """The bytes that `save_image` writes; they depend on the picture and the settings alone."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = None if settings is None else _settings_text(settings)
    buffer = io.BytesIO()
    if suffix.lower() == ".png":
        info = PngInfo()
        if settings is not None and text is not None:
            info.add_text(SETTINGS_KEY, text)
            info.add_text("parameters", parameters_text(settings))
        image.save(buffer, "PNG", pnginfo=info)
    elif suffix.lower() in IMAGE_SUFFIXES:
        exif = Image.Exif()
        if text is not None:
            exif[_EXIF_DESCRIPTION] = text
        image.save(buffer, "WEBP" if suffix.lower() == ".webp" else "JPEG", quality=95, exif=exif)
    else:
        raise InputError(f"cannot write a picture as {suffix or 'a file without suffix'!r}; use .png, .jpg or .webp")
    return buffer.getvalue()


def check_storable(path: str | os.PathLike[str], settings: StoredSettings) -> None:
    """Refuse, before a picture is painted, settings that its file could not hold.

    Raises:
        InputError: names the limit, and the remedy.
    """
    suffix = Path(path).suffix.lower()
    limit = _PNG_LIMIT if suffix == ".png" else _EXIF_LIMIT
    if len(_settings_text(settings)) > limit:
        remedy = "" if suffix == ".png" else ", or write a .png"
        raise InputError(
            f"the prompt is too long to be stored in {os.fspath(path)}, which holds {limit:,} bytes of settings; "
            f"shorten it (a network reads 75 tokens){remedy}"
        )


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings inside a picture.

    Raises:
        InputError: no picture, or one that this suite did not write.
    """
    image = open_image(path)
    try:
        text = image.info.get(SETTINGS_KEY) or image.getexif().get(_EXIF_DESCRIPTION)
    except Exception:  # tags that are broken, in as many ways
        text = None
    remedy = "give a picture that `generate` wrote"
    if not isinstance(text, str):
        raise InputError(f"{path} holds no settings of this suite; {remedy}")
    return parse_json(text, f"{path} holds no settings of this suite: its text", remedy)


def _settings_text(settings: StoredSettings) -> str:
    """Half characters, which paths may hold on Linux, are no text for a file."""
    return json.dumps(_whole(settings), sort_keys=True)


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, (list, tuple)) else value


def parameters_text(settings: StoredSettings) -> str:
    """The settings in the text form that A1111, Forge and most galleries read from a PNG."""
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    fields = {label: settings[key] for label, key in _PARAMETERS.items() if settings.get(key) is not None}
    if "Sampler" in fields:
        fields["Sampler"] = SAMPLER_NAMES.get(fields["Sampler"], fields["Sampler"])
    if "width" in settings and "height" in settings:
        fields["Size"] = f"{settings['width']}x{settings['height']}"
    if settings.get("strength") is not None and settings.get("image"):
        fields["Denoising strength"] = settings["strength"]
    lines.append(", ".join(f"{label}: {_quoted(value)}" for label, value in fields.items()))
    return _whole("\n".join(lines))


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text) if any(mark in text for mark in ',:\n"') else text


# --- grids ------------------------------------------------------------------------------------------------------------


def labelled_grid(
    rows: Sequence[Sequence[Image]], column_labels: Sequence[str], row_labels: Sequence[str], gap: int = 8
) -> Image:
    """One picture of all pictures: `column_labels` on top, each row under its own label."""
    from PIL import Image, ImageDraw, ImageFont

    width = max(image.width for row in rows for image in row)
    heights = [max(image.height for image in row) for row in rows]
    font: Any = ImageFont.load_default(max(12, min(width // 10, 28)))
    total = len(column_labels) * (width + gap) + gap
    heads = [wrap_text(label, font, width) for label in column_labels]
    titles = [wrap_text(label, font, total - 2 * gap) for label in row_labels]
    line = int(sum(font.getmetrics()) * 1.15)
    head = max(len(lines) for lines in heads) * line + gap
    bands = [len(lines) * line + gap // 2 for lines in titles]
    sheet = Image.new("RGB", (total, gap + head + sum(bands) + sum(heights) + len(rows) * gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(heads):
        draw.text((gap + column * (width + gap), gap), "\n".join(lines), "black", font)
    y = gap + head
    for lines, band, row, height in zip(titles, bands, rows, heights, strict=True):
        draw.text((gap, y), "\n".join(lines), "dimgray", font)
        for column, image in enumerate(row):
            sheet.paste(image, (gap + column * (width + gap), y + band))
        y += band + height + gap
    return sheet


def wrap_text(text: str, font: Any, width: int) -> list[str]:
    """Break `text` at spaces into lines no wider than `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


# --- files ------------------------------------------------------------------------------------------------------------


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
