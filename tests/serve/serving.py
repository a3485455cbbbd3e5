"""What the tests of the server share."""

from __future__ import annotations

import base64
import io

from PIL import Image

from lcm_core.serve.fields import Limits

LIMITS = Limits(side=128, steps=8, pictures=4, waiting=4, body=200_000, prompt=200, input_pixels=300 * 300)
JSON = {"Content-Type": "application/json"}


def picture(colour: str = "red", size: tuple[int, int] = (64, 64)) -> str:
    """A PNG in base64."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decoded(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image
