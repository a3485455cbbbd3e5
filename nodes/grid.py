"""LCM Steps Grid: one prompt at several step counts and guidance scales, as one labelled picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy
import torch
from comfy_api.latest import io
from einops import rearrange
from PIL import Image

from lcm_core.errors import InputError
from lcm_core.pipeline.image import labelled_grid

from . import inputs
from .host import schema
from .sampling import Painter, choose_settings, noise_of, read_latent, reporter


class LCMStepsGrid(io.ComfyNode):
    """A comparison over steps and guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="LCMStepsGrid",
            display_name="LCM Steps Grid",
            aliases=["xy plot", "compare", "contact sheet"],
            description="The same prompt and seed at several numbers of steps (columns) and guidance scales (rows), "
            "labelled: see at a glance what suits a model.",
            inputs=[
                inputs.model(),
                inputs.positive(),
                io.Latent.Input(
                    "latent_image", tooltip="An empty latent, or an encoded image. Its first picture is used."
                ),
                io.Vae.Input("vae", tooltip="Turns the latents into pictures."),
                inputs.seed(),
                io.String.Input("steps", default="1, 2, 4, 8", tooltip="Numbers of steps to compare: the columns."),
                io.String.Input(
                    "guidance_scales", default="0", tooltip="Guidance scales to compare: the rows. 0: the model's own."
                ),
                inputs.model_sampler(),
                inputs.strength(),
                inputs.negative(),
                inputs.gamma(),
                inputs.original_steps(),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="All pictures on one labelled sheet."),
                io.Image.Output(display_name="images", tooltip="The pictures themselves, row by row, as a batch."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        latent_image: dict[str, Any],
        vae: Any,
        seed: int = 0,
        steps: str = "1, 2, 4, 8",
        guidance_scales: str = "0",
        negative: Any = None,
        **options: Any,
    ) -> io.NodeOutput:
        """Paint every cell with the same noise."""
        columns = inputs.read_list(steps, int, "steps")
        scales = inputs.read_list(guidance_scales, float, "guidance_scales")
        if not columns or not scales:
            raise InputError("the grid has no cells; give at least one number of steps and one guidance scale")
        rows = [choose_settings(model, scale, **options)[0] for scale in scales]
        latent = _first(read_latent(model, latent_image))
        painters = [
            Painter(model, replace(row, num_inference_steps=count), positive, negative)
            for row in rows
            for count in columns
        ]
        done, after = 0, reporter(model, sum(painter.steps for painter in painters))
        pictures = []
        for painter in painters:
            samples = painter.paint(latent, noise_of(latent, seed), after(done))
            done += painter.steps
            pictures.append(_first_picture(vae.decode(samples)))
        images = torch.cat(pictures)
        heads = [f"{count} step" + "s" * (count != 1) for count in columns]
        sheet = labelled_grid(
            _in_rows(images, len(columns)), heads, [f"guidance {row.guidance_scale:g}" for row in rows]
        )
        return io.NodeOutput(torch.from_numpy(numpy.array(sheet)).float()[None] / 255, images)


def _first(latent: dict[str, Any]) -> dict[str, Any]:
    return latent | {"samples": latent["samples"][:1], "batch_index": list(latent.get("batch_index") or [0])[:1]}


def _first_picture(decoded: torch.Tensor) -> torch.Tensor:
    """(1, H, W, 3): the first picture, of a video its first frame."""
    return rearrange(decoded, "... h w c -> (...) h w c")[:1, ..., :3]


def _in_rows(images: torch.Tensor, width: int) -> list[list[Image.Image]]:
    pictures = [Image.fromarray((image.clamp(0, 1) * 255).round().byte().cpu().numpy()) for image in images]
    return [pictures[start : start + width] for start in range(0, len(pictures), width)]
