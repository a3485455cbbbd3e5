"""Pictures and scores of a run, while it goes on and at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks.lora_layers import Which
from lcm_core.pipeline.model import Model
from lcm_core.pipeline.options import PictureOptions
from lcm_core.pipeline.parts import as_network
from lcm_core.pipeline.sources import ModelSource
from trainer.config import DistillConfig
from trainer.data.cache import EMOJI, LatentCache
from trainer.data.hashing import hash_tensors
from trainer.data.index import find_index
from trainer.data.remote import is_remote
from trainer.distributed import Processes
from trainer.evaluate.scores import Evaluation, benchmark_evaluation, folder_evaluation, grade, read_pictures
from trainer.evaluate.style import kept, own_features, read_references, style_evaluation
from trainer.outputs import guidance_of, recommended_of, run_name
from trainer.report.preview import preview_grid, save_samples
from trainer.report.prompts import read_prompts
from trainer.scores import TEACHER_STEPS, Scores, shown_steps
from trainer.students import Student

if TYPE_CHECKING:
    from trainer.setup import Setup


@contextmanager
def painter(setup: Setup, student: Student, role: str) -> Iterator[Model]:
    """The teacher or the student as a model that paints, on the run's own U-Net; VAE and text encoders come and go."""
    adapters, device, source = student.adapters, setup.processes.device, setup.source
    own = student.unet if adapters is not None or student.average is None else student.average
    network: Any = student.teacher_unet or own if role == "teacher" else own
    call = as_network(source, network)
    vae, text = setup.teacher.open_vae(device), setup.teacher.open_text(device)
    said = source.recommended
    if role == "teacher":
        recommended = replace(said, sampler="euler")
    else:
        inside = adapters is not None and not call.reads_guidance  # as of a LoRA
        guidance = 1.0 if inside else guidance_of(setup.config.method, source)
        recommended = replace(recommended_of(setup.config, source, setup.info), guidance_scale=guidance)
    model = Model(
        name=role,
        unet=call,
        vae=vae,
        text=text,
        diffusion=setup.diffusion,
        resolution=said.resolution or (call.sample_size or 0) * vae.scale,
        recommended=recommended,
    )
    which: Which = "off" if role == "teacher" else student.final
    with nullcontext() if adapters is None else adapters.using(which), torch.no_grad():
        yield model


def preview_prompts(config: DistillConfig, cache: LatentCache) -> list[PictureOptions]:
    """The prompts of all preview pictures: the given ones, or captions from all over the data."""
    if config.report.preview_prompts:
        return read_prompts(config.report.preview_prompts)
    return [PictureOptions(prompt=caption, seed=number) for number, caption in enumerate(cache.examples)]


def show_off(setup: Setup, student: Student, prompts: Sequence[PictureOptions], weights: Path) -> Scores:
    """Pictures of teacher and student, and their scores where there is something to compare with.

    Args:
        setup: the run.
        student: what was trained.
        prompts: of the pictures.
        weights: the student's file. Where it and the teacher are those of the last time, no row is measured again.
    """
    evaluation = _evaluation(setup) if is_scored(setup.config, setup.source) else None
    hashes = {
        "teacher": setup.teacher.hash_unet(setup.info.prediction_type),
        "student": hash_tensors(read_safetensors(weights)[0]),
    }
    scores = Scores.open(setup.folder, evaluation, hashes)
    if evaluation is not None and setup.config.lora:
        references = read_references(setup.folder)
        about = {"role": "base", "model": "base", "sampler": "euler", "steps": TEACHER_STEPS}
        about["guidance_scale"] = references.guidance_scale
        scores.rows.insert(0, {**about, **grade(evaluation, references.base)})
    seeds = list(range(len(prompts)))
    roles = {"teacher": "teacher", "student": run_name(setup.config)}
    for role, name in roles.items():
        if role == "teacher" and student.adapters is None and student.teacher_unet is None:
            continue
        with painter(setup, student, role) as model:
            if setup.config.report.preview_every:
                save_samples(setup.folder, role, model, prompts, seeds, shown_steps(role))
            if evaluation is not None:
                for steps in shown_steps(role):
                    scores.add(role, name, model, evaluation, steps, model.settings().guidance_scale)
    if words := kept(scores.rows):
        scores.remark += f" {words[0].upper()}{words[1:]} (a style of 0 is the base's, of 1 the teacher's)."
        scores.write()
    return scores


def is_scored(config: DistillConfig, source: ModelSource) -> bool:
    """Whether there is something to compare with: the benchmark's drawings, or the pictures that it learnt from, where
    these are here and not only their latents."""
    path = config.data.path
    has_pictures = bool(path) and not is_remote(path) and (path == EMOJI or find_index(Path(path)) is None)
    return bool(config.report.samples) and (source.is_shipped or has_pictures or bool(config.lora))


def _evaluation(setup: Setup) -> Evaluation:
    """The embedded model is measured on its benchmark, another against the pictures that it learnt from."""
    from trainer.recipes.emoji.benchmark import load_benchmark
    from trainer.recipes.emoji.features import extract

    config, samples = setup.config, setup.config.report.samples
    if config.lora:
        return style_evaluation(read_references(setup.folder), own_features())
    by_class = setup.teacher.labels is not None
    if setup.source.is_shipped or config.data.path == "emoji":
        return benchmark_evaluation(load_benchmark(samples), by_group=by_class)
    from trainer.data.labels import read_labelled

    features = partial(extract, load_benchmark(samples).features)
    side = setup.teacher.resolution
    items = read_labelled(Path(config.data.path), config.data.labels, setup.teacher.labels).items
    pictures = read_pictures(items, (side, side), features, Processes(setup.processes.device))
    return folder_evaluation(pictures, samples, features, is_inception=False, by_class=by_class)


def save_preview(setup: Setup, student: Student, prompts: Sequence[PictureOptions], step: int, loss: float) -> None:
    """Every so many steps, the same pictures again."""
    report = setup.config.report
    if not report.preview_every or (step + 1) % report.preview_every:
        return
    file = setup.folder / "previews" / f"step-{step + 1:06d}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    paint_preview(setup, student, prompts, file)


def paint_preview(setup: Setup, student: Student, prompts: Sequence[PictureOptions], file: Path) -> None:
    """The preview grid of the student as it is now."""
    with painter(setup, student, "student") as model:
        grid = preview_grid(model, prompts, list(range(len(prompts))), setup.config.report.preview_steps)
    grid.save(file)
