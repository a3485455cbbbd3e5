"""Scores of a model: Frechet distance, recall and alignment, on the benchmark or against the user's own pictures.

Every picture has its own seed, so several processes can paint a share each and the scores stay the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcm_core.cli.common import plural
from lcm_core.diffusion.samplers import NoiseSampler
from lcm_core.errors import InputError
from lcm_core.pipeline import PictureOptions, Pipeline
from lcm_core.pipeline.generate import Inputs, noise_source, paint
from lcm_core.pipeline.image import load_image
from lcm_core.pipeline.model import Model
from lcm_core.pipeline.prompts import encode_prompts
from lcm_core.pipeline.settings import Settings
from trainer.distributed import Processes
from trainer.evaluate.metrics import class_alignment, frechet_distance, recall, retrieval_accuracy
from trainer.evaluate.pretrained import CaptionScore, Features
from trainer.evaluate.share import collect, gather, share
from trainer.recipes.emoji.benchmark import Benchmark
from trainer.recipes.emoji.features import extract

BATCH_SIZE = 32


@dataclass(frozen=True)
class Evaluation:
    """What a model has to paint, and what its pictures are measured by.

    Attributes:
        captions: one for each picture; picture i is painted from seed i.
        features: the network in whose features the pictures are compared with the real ones.
        real: features of the real pictures, (N, D).
        distance: name of the Frechet distance in the table; only Inception's may be called "fid".
        alignment: more scores from the pictures' features, (M, D).
        caption_score: how well each picture fits its caption.
        note: which evaluation this is, to tell tables of different ones apart.
        change_noise: puts other noise in the place of the first, (B, C, h, w), to see what a model makes of it.
    """

    captions: list[str]
    features: Features
    real: Tensor
    distance: str = "fd"
    alignment: Callable[[Tensor], dict[str, float]] | None = None
    caption_score: CaptionScore | None = None
    note: dict[str, Any] = field(default_factory=dict)
    change_noise: Callable[[Tensor], Tensor] | None = None


def benchmark_evaluation(
    benchmark: Benchmark, caption_score: CaptionScore | None = None, by_group: bool = False
) -> Evaluation:
    """The emoji benchmark: captions of real drawings, alignment by retrieval. For class-conditional models, `by_group`,
    the groups of emoji are asked for and looked for."""
    features = partial(extract, benchmark.features)
    note = {"pictures": len(benchmark.chosen), "real": "the emoji benchmark's drawings", "features": "the benchmark's"}
    if by_group:
        classes = [entry.group for entry in benchmark.entries]
        captions = [classes[i] for i in benchmark.chosen.tolist()]
        found = class_alignment(captions, benchmark.real, classes)
        return Evaluation(captions, features, benchmark.real, alignment=found, note={**note, "by": "group"})
    wanted = benchmark.codes[benchmark.chosen]
    groups = {
        "alignment": torch.ones_like(benchmark.held_out),
        "seen_alignment": ~benchmark.held_out,
        "held_out_alignment": benchmark.held_out,
    }

    def alignment(features: Tensor) -> dict[str, float]:
        return {
            name: retrieval_accuracy(features[group], wanted[group], benchmark.real, benchmark.codes)
            for name, group in groups.items()
            if bool(group.any())
        }

    return Evaluation(
        captions=[benchmark.entries[i].plain_caption for i in benchmark.chosen.tolist()],
        features=features,
        real=benchmark.real,
        alignment=alignment,
        caption_score=caption_score,
        note=note,
    )


@dataclass(frozen=True)
class RealPictures:
    """The user's own pictures: their features (N, D), their captions, and the unreadable ones with the reasons."""

    features: Tensor
    captions: list[str]
    skipped: list[tuple[str, str]]


def read_pictures(
    items: Sequence[Any], size: tuple[int, int], features: Features, processes: Processes
) -> RealPictures:
    """Features of real pictures, each process reading its share.

    Args:
        items: `trainer.data.sources.Item`s.
        size: (width, height) that all pictures are scaled to cover and cropped to, as large as the painted ones.
        features: the network.
        processes: the processes that share the work.

    Raises:
        InputError: not one picture can be read.
    """
    rows, skipped = [], []
    for index in share(processes, len(items)):
        try:
            pixels = load_image(items[index].open(), size)
        except InputError as error:
            skipped.append((index, items[index].key, str(error)))
            continue
        rows.append((index, features(((pixels + 1) * 127.5).round().byte())))
    gathered = gather(processes, (rows, skipped))
    read = sorted((row for part, _ in gathered for row in part), key=lambda row: row[0])
    if not read:
        raise InputError(f"none of {plural(len(items), 'picture')} can be read; give a folder of PNG, JPEG or WebP")
    lost = sorted(entry for _, part in gathered for entry in part)
    captions = [items[index].caption for index, _ in read]
    return RealPictures(torch.cat([row for _, row in read]), captions, [(key, why) for _, key, why in lost])


def folder_evaluation(
    pictures: RealPictures,
    samples: int,
    features: Features,
    is_inception: bool,
    caption_score: CaptionScore | None = None,
    note: dict[str, Any] | None = None,
    by_class: bool = False,
) -> Evaluation:
    """The user's own pictures: as many of their captions, in a fixed shuffled order, as `samples` says. Of a
    class-conditional model, `by_class`, the captions are classes, which are looked for too."""
    generator = torch.Generator().manual_seed(1234)
    rounds = -(-samples // len(pictures.captions))
    order = [i for _ in range(rounds) for i in torch.randperm(len(pictures.captions), generator=generator).tolist()]
    captions = [pictures.captions[i] for i in order[:samples]]
    return Evaluation(
        captions=captions,
        features=features,
        real=pictures.features,
        alignment=class_alignment(captions, pictures.features, pictures.captions) if by_class else None,
        distance="fid" if is_inception else "fd",
        caption_score=caption_score,
        note={
            "pictures": samples,
            "real": plural(len(pictures.captions), "picture") + " of your own",
            "features": "Inception's" if is_inception else "the benchmark's",
            **(note or {}),
        },
    )


def evaluate_rows(
    name: str,
    model: Model,
    evaluation: Evaluation,
    steps: Sequence[int],
    processes: Processes | None = None,
    progress: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """One row of scores for each number of steps, by the names of `report.tables.COLUMNS`. All processes get all rows.

    Args:
        name: of the model, for the table.
        model: what paints.
        evaluation: what is painted and measured.
        steps: numbers of steps.
        processes: those that share the pictures; None for this one alone.
        progress: show a bar.
        **options: `sampler`, `guidance_scale` and others of `Settings`; what is left out or None, the model decides.

    Raises:
        InputError: a setting that this model cannot use, or broken pictures.
    """
    return [_score(name, model, evaluation, number, processes or Processes(), progress, options) for number in steps]


def _score(
    name: str,
    model: Model,
    evaluation: Evaluation,
    steps: int,
    processes: Processes,
    progress: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    settings = Pipeline(model).resolve(PictureOptions(num_inference_steps=steps, **options))
    start = time.monotonic()
    features, fits = _paint(model, evaluation, processes, settings, f"{name}, {plural(steps, 'step')}", progress)
    seconds = time.monotonic() - start
    row: dict[str, Any] = {
        "model": name,
        "sampler": settings.sampler,
        "steps": steps,
        "guidance_scale": settings.guidance_scale,
        **grade(evaluation, features),
    }
    if evaluation.caption_score is not None:
        row["clip_score"] = float(fits.mean())
    return {**row, "images_per_second": len(features) / seconds}


def grade(evaluation: Evaluation, features: Tensor) -> dict[str, float]:
    """What an evaluation says of pictures, one for each caption, by their features (M, D)."""
    scores = {
        evaluation.distance: frechet_distance(evaluation.real, features),
        "recall": recall(evaluation.real, features),
    }
    return scores if evaluation.alignment is None else scores | evaluation.alignment(features)


def _paint(
    model: Model, evaluation: Evaluation, processes: Processes, settings: Settings, label: str, progress: bool
) -> tuple[Tensor, Tensor]:
    """Features (M, D) and caption scores (M,) of all pictures; the latter are zeros where nobody asked."""
    from tqdm import tqdm

    seeds = share(processes, len(evaluation.captions))
    features, fits = [], []
    with tqdm(total=len(seeds), desc=label, unit="picture", disable=not progress) as bar:
        for start in range(0, len(seeds), BATCH_SIZE):
            part = list(seeds[start : start + BATCH_SIZE])
            captions = [evaluation.captions[seed] for seed in part]
            pictures = paint_captions(model, captions, part, settings, evaluation.change_noise)
            features.append(evaluation.features(pictures))
            fits.append(
                torch.zeros(len(part))
                if evaluation.caption_score is None
                else evaluation.caption_score(pictures, captions)
            )
            bar.update(len(part))
    total = len(evaluation.captions)
    return collect(processes, torch.cat(features), total), collect(processes, torch.cat(fits), total)


def paint_captions(
    model: Model,
    captions: list[str],
    seeds: Sequence[int],
    settings: Settings,
    change_noise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Pictures (B, 3, H, W) uint8 on the CPU, by the same way that users' pictures take.

    `change_noise` puts other noise in the place of the first, (B, C, h, w).
    """
    size = settings.width, settings.height
    cond, uncond = (encode_prompts(model, words, size, "plain") for words in (captions, [""] * len(captions)))
    plain = noise_source(seeds, model.device)

    def noise(shape: Sequence[int]) -> tuple[Tensor, NoiseSampler]:
        first, later = plain(shape)
        return (first if change_noise is None else change_noise(first)), later

    pixels = paint(model, Inputs(cond, uncond, noise), settings)
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()


def check_samples(samples: int, processes: Processes) -> None:
    """Refuse fewer pictures than the scores, or the processes, need.

    Raises:
        InputError: it names how many.
    """
    least = max(8, processes.size)
    if samples < least:
        raise InputError(f"--samples {samples} is too few; use at least {least}, and 2048 for numbers to compare")
