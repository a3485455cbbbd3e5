"""Contact sheets: many pictures as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lcm_core.pipeline.image import wrap_text

if TYPE_CHECKING:
    from PIL.Image import Image

_LEAST_CELL = 128  # pixels: room for a label below a small picture


def contact_sheet(images: Sequence[Image], labels: Sequence[str], gap: int = 8) -> Image:
    """One picture of all pictures, which are of one size, each above its own label; as many columns as rows."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = images[0].size
    cell = max(width, _LEAST_CELL)
    font: Any = ImageFont.load_default(12)
    words = [wrap_text(label, font, cell)[:3] for label in labels]
    line = int(sum(font.getmetrics()) * 1.15)
    step = height + line * max(map(len, words)) + 2 * gap
    columns = math.ceil(len(images) ** 0.5)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * step + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, lines) in enumerate(zip(images, words, strict=True)):
        x, y = gap + number % columns * (cell + gap), gap + number // columns * step
        sheet.paste(image, (x, y))
        draw.text((x, y + height + gap // 2), "\n".join(lines), "dimgray", font)
    return sheet
