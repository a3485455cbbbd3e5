"""Pictures of a model in training: the same prompts and seeds each time, so that only the model makes a difference."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.cli.common import plural
from lcm_core.pipeline import PictureOptions, Pipeline
from lcm_core.pipeline.image import labelled_grid, read_settings, save_image
from lcm_core.pipeline.model import Model
from lcm_core.pipeline.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS = (1, 2, 4, 8)
"""Numbers of steps at which teacher and student are shown."""
SAMPLES = "samples"
"""Folder, inside a run's, of the pictures that `save_samples` writes."""
BATCH_SIZE = 4
Prompt = str | PictureOptions
"""The prompt of a preview: a text, or a text with a size, a seed and the like."""


def paint_previews(
    model: Model, prompts: Sequence[Prompt], seeds: Sequence[int], steps: Sequence[int] = STEPS, **options: Any
) -> dict[int, list[tuple[Image, dict[str, Any]]]]:
    """Paint, for each number of steps, one picture for each prompt, with the settings that make it again.

    Args:
        model: what paints.
        prompts, seeds: pairs, as many of the one as of the other. A prompt with options of its own wins over the rest.
        steps: numbers of steps.
        **options: `sampler`, `guidance_scale`, ...; what is left out or None, the model decides (`Pipeline.resolve`).

    Raises:
        InputError: a setting that this model cannot use.
    """
    pipe, columns = Pipeline(model), {}
    for number in steps:
        base = PictureOptions(num_inference_steps=number, **options)
        pictures = [
            pipe.resolve(base | PictureOptions(seed=seed) | _as_options(prompt))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        images = [image for _, alike in groupby(pictures, _all_but_prompt) for image in _paint(pipe, list(alike))]
        columns[number] = [
            (image, pipe.describe(picture).said) for image, picture in zip(images, pictures, strict=True)
        ]
    return columns


def _as_options(prompt: Prompt) -> PictureOptions:
    return PictureOptions(prompt=prompt) if isinstance(prompt, str) else prompt


def _all_but_prompt(settings: Settings) -> Settings:
    """What pictures of one batch have in common."""
    return replace(settings, prompt="", seed=0)


def _paint(pipe: Pipeline, pictures: Sequence[Settings]) -> Iterator[Image]:
    return pipe.paint(pictures, batch_size=BATCH_SIZE)


def preview_grid(
    model: Model, prompts: Sequence[Prompt], seeds: Sequence[int], steps: int | Sequence[int] = STEPS, **options: Any
) -> Image:
    """One labelled picture of all previews: a row for each prompt, a column for each number of steps.

    Arguments and errors are those of `paint_previews`.
    """
    numbers = [steps] if isinstance(steps, int) else list(steps)
    columns = paint_previews(model, prompts, seeds, numbers, **options)
    rows = zip(*([image for image, _ in columns[number]] for number in numbers), strict=True)
    labels = [_as_options(prompt).prompt or "" for prompt in prompts]
    return labelled_grid(list(rows), [plural(number, "step") for number in numbers], labels)


def save_samples(
    folder: str | os.PathLike[str],
    role: str,
    model: Model,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    steps: Sequence[int] = STEPS,
    **options: Any,
) -> None:
    """Paint previews and keep each as its own file in `folder`/samples, with its settings inside, for the report.

    Args:
        folder: the run's.
        role: who paints, e.g. "teacher" or "student"; the report sets them side by side.
        model, prompts, seeds, steps, **options: as in `paint_previews`.
    """
    for number, pictures in paint_previews(model, prompts, seeds, steps, **options).items():
        for index, (image, settings) in enumerate(pictures):
            save_image(image, Path(folder) / SAMPLES / f"{role}-{number:02d}-{index:03d}.png", settings)


@dataclass(frozen=True)
class Sample:
    """One picture of `save_samples`."""

    path: Path
    role: str
    steps: int
    index: int
    """Which prompt, counted from 0."""
    settings: dict[str, Any]


def read_samples(folder: str | os.PathLike[str]) -> list[Sample]:
    """All pictures that `save_samples` left in a run's folder, in the order of their names.

    Raises:
        InputError: a picture that was not written by it.
    """
    found = []
    for path in sorted((Path(folder) / SAMPLES).glob("*-*-*.png")):
        role, steps, index = path.stem.rsplit("-", 2)
        found.append(Sample(path, role, int(steps), int(index), read_settings(path)))
    return found
