"""The loss of a training run as a picture, drawn anew while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from trainer.report.charts import Axis

from .panel import running_mean

WIDTH, HEIGHT = 512, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 28, 34


def draw_loss(losses: Sequence[float], steps: int) -> Image.Image:
    """Every step's loss in grey, their running mean in blue, on a logarithmic axis.

    Args:
        losses: one number for each step so far, at least one.
        steps: of the whole run: the width of the plot.
    """
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    across = Axis([0, max(steps, 2)], _LEFT, WIDTH - _RIGHT, log=False)
    up = Axis(losses, HEIGHT - _BOTTOM, _TOP, log=True)
    for tick in up.ticks:
        draw.line([(_LEFT, up(tick)), (WIDTH - _RIGHT, up(tick))], "gainsboro")
        draw.text((_LEFT - 6, up(tick)), f"{tick:g}", "dimgray", font, anchor="rm")
    for tick in across.ticks:
        draw.text((across(tick), HEIGHT - _BOTTOM + 6), f"{tick:g}", "dimgray", font, anchor="ma")
    mean = running_mean(losses)
    _line(draw, [(across(step), up(loss)) for step, loss in enumerate(losses)], "silver", 1)
    _line(draw, [(across(step), up(loss)) for step, loss in enumerate(mean)], "royalblue", 2)
    draw.text((_LEFT, 6), f"loss, step {len(losses)} of {steps}: {mean[-1]:.4g}", "black", font)
    return sheet


def _line(draw: Any, points: list[tuple[float, float]], colour: str, width: int) -> None:
    if len(points) == 1:
        points = [points[0], (points[0][0] + 1, points[0][1])]
    draw.line(points, colour, width)
