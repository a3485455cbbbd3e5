"""The finished model's folder: weights, settings, benchmark, table and card."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lcm_core.files.atomic import atomic_write
from lcm_core.files.lora import save_lora
from lcm_core.files.quantised import quantise
from lcm_core.files.safetensors import (
    DIFFUSERS_WEIGHTS,
    int8_variant,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from lcm_core.pipeline.model import Model, load_model
from trainer.recipes.emoji import AnyModule
from trainer.recipes.emoji.benchmark import FIRST_FILE, load_benchmark, load_first_features
from trainer.recipes.emoji.card import model_card
from trainer.recipes.emoji.data import SHIPPED, save_shipped
from trainer.recipes.emoji.features import extract, save_features
from trainer.recipes.emoji.latents import CaptionedLatents
from trainer.recipes.emoji.score_table import Row, ScoreTable
from trainer.recipes.emoji.stages import DISTILLATION, LORA_DISTILLATION, LORA_FILE, STAGES, Recipe, get_features
from trainer.recipes.emoji.teacher import PREDICTION_TYPE

TEACHER_GUIDANCE = (1.5, 2.0, 3.0)
STUDENT_GUIDANCE = (1.0, 1.5, 2.0, 3.0)
"""Guidance scales that are tried; the one of lowest FD becomes the default."""
QUANTISED = ("unet_teacher", "unet_lcm", "vae")
"""Networks whose weights are stored in 8 bits."""
GUIDANCE_SAMPLES = 512
"""Pictures behind each trial of a guidance scale."""


def ship_benchmark(recipe: Recipe, folder: Path, data: CaptionedLatents) -> None:
    """Put this and the first benchmark's feature network, and what they see in the core styles, beside the model."""
    network, first = get_features(recipe), load_first_features()
    folder.mkdir()
    save_features(folder / "features.safetensors", network)
    save_features(folder / FIRST_FILE, first)
    entries = recipe.drawings.entries
    core = torch.tensor([i for i, e in enumerate(entries) if e.is_core])
    is_shipped = torch.tensor([entries[i].is_core for i in data.chosen.tolist()])
    latents = data.latents[data.largest][: len(is_shipped)][is_shipped]
    images = recipe.drawings.on_white(core)
    real = {"features": extract(network, images), "features_first": extract(first, images)}
    save_shipped(folder, [entries[i] for i in core.tolist()], latents, real)


def load_models(recipe: Recipe, folder: Path) -> dict[str, Model]:
    """The finished model's three ways to paint."""
    return {
        "teacher": load_model(folder, recipe.device, unet="teacher"),
        "LCM": load_model(folder, recipe.device, unet="lcm"),
        "LCM-LoRA": load_model(folder, recipe.device, unet="teacher", lora=[(folder / LORA_FILE, 1.0)]),
    }


def get_table(recipe: Recipe, folder: Path, models: dict[str, Model]) -> list[Row]:
    """Every line of the table, from the finished model's files; each is measured once and kept in the work folder."""
    work, size = recipe.options.work, recipe.options.size
    shipped, samples = folder / SHIPPED.name, recipe.options.samples
    trial = ScoreTable(work / f"guidance-{size}.json", load_benchmark(min(GUIDANCE_SAMPLES, samples), shipped), models)
    guidance = min(TEACHER_GUIDANCE, key=lambda g: trial.row("teacher", "dpmpp_2m", 25, g).fd)
    student_guidance = min(STUDENT_GUIDANCE, key=lambda g: trial.row("LCM", "lcm", 4, g).fd)
    table = ScoreTable(work / f"table-{size}.json", load_benchmark(samples, shipped), models)
    for steps in (4, 1, 2, 8):
        table.row("LCM", "lcm", steps, student_guidance)
        table.row("teacher", "dpmpp_2m", steps, guidance)
        table.row("LCM-LoRA", "lcm", steps, 1.0)
    return sorted(table.rows, key=lambda row: (row.model, row.sampler, row.steps))


def get_first_table(recipe: Recipe, folder: Path, models: dict[str, Model], rows: list[Row]) -> list[Row]:
    """The lines with 4 steps of the teacher and of the LCM, measured as the first benchmark did."""
    benchmark = load_benchmark(recipe.options.samples, folder / SHIPPED.name, first=True)
    table = ScoreTable(recipe.options.work / f"first-table-{recipe.options.size}.json", benchmark, models)
    wanted = (row for row in rows if (row.model, row.steps) in (("teacher", 4), ("LCM", 4)))
    return [table.row(row.model, row.sampler, row.steps, row.guidance_scale) for row in wanted]


def assemble(
    recipe: Recipe, folder: Path, networks: Mapping[str, AnyModule], loras: Mapping[str, dict[str, Tensor]]
) -> None:
    """Write the model as a folder that `lcm_core` loads: networks and LoRAs by their places, in half precision, and
    the largest in 8 bits."""
    for name, network in networks.items():
        copy.deepcopy(network).half().save_pretrained(folder / name)
        if name in QUANTISED:
            plain = folder / name / DIFFUSERS_WEIGHTS
            write_safetensors(folder / name / int8_variant(plain.name), quantise(read_safetensors(plain)[0]))
            plain.unlink()
        config = read_json(folder / name / "config.json")
        config.pop("_name_or_path", None)  # the work folder on this machine
        write_json(folder / name / "config.json", config)
    recipe.tokenizer.save_pretrained(folder / "tokenizer")
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(recipe.options.work / "tokenizer" / file, folder / "tokenizer" / file)
    for place, tensors in loras.items():
        save_lora(folder / place, tensors, "sd1")
    describe(recipe, folder, guidance_scale=LORA_DISTILLATION.w_min + 1, teacher_guidance_scale=TEACHER_GUIDANCE[0])


def describe(recipe: Recipe, folder: Path, guidance_scale: float, teacher_guidance_scale: float) -> None:
    """Write model.json: what the networks cannot say themselves, and what to use where the user says nothing."""
    settings = {
        "name": "emoji",
        "resolution": recipe.options.size,
        "prediction_type": PREDICTION_TYPE,
        "schedule": {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        "original_steps": DISTILLATION.original_steps,
        "guidance_scale": guidance_scale,
        "teacher_guidance_scale": teacher_guidance_scale,
        "teacher_steps": 25,
    }
    with atomic_write(folder / "model.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def finish(recipe: Recipe, folder: Path, rows: list[Row], first_rows: list[Row]) -> None:
    """Set the best guidance as the default and write the model card."""
    teacher, student = (
        min((r for r in rows if (r.model, r.steps) == key), key=lambda r: r.fd) for key in (("teacher", 8), ("LCM", 4))
    )
    describe(recipe, folder, student.guidance_scale, teacher.guidance_scale)
    card = model_card(recipe.drawings, recipe.options.size, _cost(recipe), recipe.options.device, rows, first_rows)
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


def _cost(recipe: Recipe) -> dict[str, tuple[int, int, float]]:
    """Steps, batch size and seconds of each trained stage."""
    cost = {}
    for stage in STAGES:
        config = recipe.options.loop(stage)
        metadata = read_safetensors(recipe.folder(stage) / "state.safetensors")[1]
        cost[stage] = config.steps, config.batch_size, float(metadata["seconds"])
    return cost
