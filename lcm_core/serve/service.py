"""What all doors of the server share: models, painter, limits, and requests in the words of `Settings`."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

from lcm_core.serve.fields import Fields, Limits
from lcm_core.serve.painter import Painted, Painter, PictureRequest
from lcm_core.serve.shelf import Shelf

_LORA_STRENGTH = 4.0
_SEED_BITS = 32


@dataclass(frozen=True)
class Service:
    """The running server."""

    shelf: Shelf
    painter: Painter
    limits: Limits

    async def paint(self, request: PictureRequest) -> list[Painted]:
        """Wait for the pictures. Whoever cancels this stops the painting too.

        Raises:
            InputError: what the model cannot do.
        """
        job = self.painter.submit(request)
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            job.stop()
            raise


def read_options(fields: Fields, steps: str = "steps", guidance: str = "guidance") -> dict[str, Any]:
    """The fields of `PictureOptions` that every door has.

    Args:
        fields: the request.
        steps, guidance: what the door calls these.

    Raises:
        RequestError: names the field.
    """
    side = fields.limits.side
    return {
        "num_inference_steps": fields.whole(steps, 1, fields.limits.steps),
        "guidance_scale": fields.number(guidance, 0, 100),
        "nag_scale": fields.number("nag", 0, 100),
        "width": fields.whole("width", 1, side),
        "height": fields.whole("height", 1, side),
        "negative_prompt": fields.text("negative_prompt") or None,
    }


def read_seed(fields: Fields) -> int:
    """The seed; any where it is missing or -1."""
    seed = fields.whole("seed", -1, 2**64 - 1, default=-1)
    return random.getrandbits(_SEED_BITS) if seed is None or seed < 0 else seed


def read_lora(fields: Fields) -> list[tuple[str, float]]:
    """One LoRA, as the page asks for it."""
    name = fields.text("lora")
    strength = fields.number("lora_strength", -_LORA_STRENGTH, _LORA_STRENGTH, default=1.0)
    return [(name, strength or 0.0)] if name else []
