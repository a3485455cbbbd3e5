"""How much of a LoRA's style a student of base + LoRA keeps: scores against what base and base + LoRA paint themselves.

No pictures of the style are needed. Both paint the same prompts from the same seeds; what lies between the means of
their features is the style, and a model's style score is how far along that way its own mean lies: 0 as the base, 1 as
base + LoRA. Alignment is the share of pictures whose nearest one by base + LoRA shows the same prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lcm_core.files.safetensors import read_metadata, read_safetensors, write_safetensors
from lcm_core.pipeline import PictureOptions, Pipeline
from lcm_core.pipeline.model import Loras, Model, load_model
from trainer.data.hashing import hash_json
from trainer.evaluate.metrics import class_alignment
from trainer.evaluate.pretrained import Features
from trainer.evaluate.scores import BATCH_SIZE, Evaluation, paint_captions
from trainer.recipes.emoji.benchmark import load_benchmark
from trainer.recipes.emoji.features import extract
from trainer.scores import TEACHER_STEPS

if TYPE_CHECKING:
    from trainer.setup import Setup

FILE = "references.safetensors"
SHOWN_STEPS = 4
"""Steps of the student, in the line that says what is kept."""
KEPT = ("style", "alignment", "recall")


@dataclass(frozen=True)
class References:
    """What base and base + LoRA paint: features (N, D) each, of the same prompts and seeds."""

    captions: list[str]
    base: Tensor
    styled: Tensor
    guidance_scale: float


def paint_references(setup: Setup, captions: Sequence[str]) -> None:
    """Paint the references of a run, from other seeds than the rows, unless its folder has them.

    Args:
        setup: the run, whose teacher has LoRAs.
        captions: of its data, or its prompts.
    """
    samples, teacher = setup.config.report.samples, setup.teacher
    chosen = choose_captions(captions, samples)
    about = hash_json([teacher.hash_unet(setup.info.prediction_type), teacher.hash_text(), chosen, TEACHER_STEPS])
    file = setup.folder / "run" / FILE
    if not file.is_file() or read_metadata(file).get("about") != about:
        base, scale = _paint(setup, "base", chosen, ())
        styled, _ = _paint(setup, "base with LoRA", chosen, teacher.lora_files)
        stated = {"about": about, "captions": json.dumps(chosen), "guidance_scale": str(scale)}
        write_safetensors(file, {"base": base, "styled": styled}, stated)


def read_references(folder: Path) -> References:
    """The references in a run's folder.

    Raises:
        InputError: they are missing or damaged.
    """
    tensors, metadata = read_safetensors(folder / "run" / FILE)
    return References(
        json.loads(metadata["captions"]), tensors["base"], tensors["styled"], float(metadata["guidance_scale"])
    )


def choose_captions(captions: Sequence[str], samples: int) -> list[str]:
    """Captions, as many as there are samples, from all over, each as often as the others."""
    distinct = [caption for caption in dict.fromkeys(captions) if caption] or [""]
    count = min(samples, len(distinct))
    spread = [distinct[i * len(distinct) // count] for i in range(count)]
    return [spread[i % count] for i in range(samples)]


def style_evaluation(references: References, features: Features) -> Evaluation:
    """Compares pictures of the references' captions with base + LoRA, and says how much of the style they have."""
    base, styled = references.base, references.styled
    way = styled.mean(0) - base.mean(0)
    aligned = class_alignment(references.captions, styled, references.captions)

    def scores(found: Tensor) -> dict[str, float]:
        return {"style": float((found.mean(0) - base.mean(0)) @ way / way.square().sum()), **aligned(found)}

    real = f"others that the teacher paints with its LoRA in {TEACHER_STEPS} steps"
    note = {"pictures": len(references.captions), "real": real, "features": "the benchmark's"}
    return Evaluation(references.captions, features, styled, alignment=scores, note=note)


def own_features() -> Features:
    """The features that everything is compared in."""
    return partial(extract, load_benchmark(8).features)


def kept(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a student keeps of base + LoRA, in one line; empty where that was not measured."""
    teacher = next((row for row in rows if row.get("role") == "teacher" and row["steps"] == TEACHER_STEPS), None)
    student = next((row for row in rows if row.get("role") == "student" and row["steps"] == SHOWN_STEPS), None)
    if teacher is None or student is None or "style" not in student:
        return ""
    shares = [f"{name} {student[name] / teacher[name]:.0%}" for name in KEPT if teacher.get(name)]
    return f"{SHOWN_STEPS} steps keep of base + LoRA at {TEACHER_STEPS} steps: {', '.join(shares)}"


def _paint(setup: Setup, name: str, captions: list[str], loras: Loras) -> tuple[Tensor, float]:
    """Features (N, D) of what the teacher paints with these LoRAs, and its guidance scale."""
    from tqdm import tqdm

    teacher, features = setup.teacher, own_features()
    model: Model = load_model(
        teacher.name,
        setup.processes.device,
        lora=loras,
        vae=teacher.vae,
        unet=teacher.source.chosen,
        tokenizer=teacher.tokenizer,
        clip_skip=teacher.clip_skip,
    )
    model.diffusion = setup.diffusion
    settings = Pipeline(model).resolve(PictureOptions(num_inference_steps=TEACHER_STEPS, sampler="euler"))
    seeds, found = range(len(captions), 2 * len(captions)), []
    with tqdm(total=len(captions), desc=f"references, {name}", unit="picture") as bar:
        for start in range(0, len(captions), BATCH_SIZE):
            part = captions[start : start + BATCH_SIZE]
            found.append(features(paint_captions(model, part, list(seeds[start : start + len(part)]), settings)))
            bar.update(len(part))
    return torch.cat(found), settings.guidance_scale
