"""The runs that `quality.py` compares: their settings, and how each is trained in the time that it gets."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lcm_core.files.safetensors import write_json
from lcm_core.pipeline.image import to_pil
from lcm_core.pipeline.model import Model, load_model
from trainer.config import DistillConfig
from trainer.options import apply
from trainer.outputs import write_weights
from trainer.recipes.emoji.data import load_shipped
from trainer.run import train as train_student
from trainer.setup import examine
from trainer.validation import painter

Values = dict[str, Any]
BASE: dict[str, Values] = {
    "lora": {
        "method": {"w_min": 1.0, "w_max": 1.0},
        "student": {"kind": "lora", "rank": 16},
        "training": {"learning_rate": 1e-3},
    },
    "full": {
        "method": {"w_min": 0.0, "w_max": 3.0},
        "student": {"kind": "full"},
        "training": {"learning_rate": 2e-4},
    },
}
"""What all methods share. The embedded teacher is best at w = 1 (guidance scale 2)."""
COMMON: Values = {"batch_size": 32, "warmup_steps": 20, "cooldown": 0.5, "ema_decay": 0.95, "tensorboard": False}
METHODS: dict[str, Values] = {
    "lcd": {"kind": "lcd"},
    "tcd": {"kind": "tcd"},
    "tcd, half to 0": {"kind": "tcd", "clean_share": 0.5},
    "segmented": {"kind": "segmented"},
    "finetune": {"kind": "finetune", "loss": "cauchy", "huber_c": 0.0, "diffusion_weight": 1.0, "pair_noise": True},
    "dmd2": {"kind": "dmd2"},
}
DMD2_RATE = 0.2
"""dmd2's learning rate, as a share of the others'."""
COARSE: dict[str, Values] = {
    "tcd, k = 100": {"kind": "tcd", "original_steps": 10, "grid_jitter": True},
    "segmented, k = 125": {"kind": "segmented", "original_steps": 8},
    "segmented, k = 125, 2 phases": {"kind": "segmented", "original_steps": 8, "phases": 2},
}
"""Grids as coarse as a teacher can stand whose 8 steps are as good as its 25."""
ANY_STEP: dict[str, Values] = {
    "flowmap, k = 125": {"kind": "flowmap", "original_steps": 8, "grid_jitter": True},
}
"""Students that are told where a jump ends."""
LONGER = 5.0
"""How much longer full models on a coarse grid are trained once more."""
VARIETY: dict[str, Values] = {
    "lognormal timesteps": {"method": {"timestep_sampling": "lognormal"}},
    "jittered timesteps": {"method": {"grid_jitter": True}},
    "noise offset": {"method": {"noise_offset": 0.1}},
    "plain pictures": {"data": {"path": "pictures"}},
    "augmented pictures": {"data": {"path": "pictures", "crop": 0.85, "colour": 0.1, "flip": True, "variants": 4}},
}
PAPER_W = 8.0
"""The w of most tables in arXiv 2310.04378."""
REHEARSAL, FIRST = 12, 2
"""Steps that tell how long one takes, and how many of them do not count. dmd2's student is trained in every fifth."""


@dataclass(frozen=True)
class Trial:
    """One training run."""

    part: str
    name: str
    student: str
    seed: int
    settings: Values = field(default_factory=dict)
    share: float = 1.0
    """The share of the time that it trains."""
    begins_with: Trial | None = None
    """The run whose result it starts from; its time counts too."""

    @property
    def whole(self) -> float:
        """Share of the time, with that of the run before."""
        return self.share + (0 if self.begins_with is None else self.begins_with.share)

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return "-".join([self.part, self.name, self.student, str(self.seed), f"{self.share:g}"]).replace(" ", "_")


def list_trials(parts: Sequence[str], seeds: Sequence[int]) -> Iterator[Trial]:
    """All runs of the chosen parts, one seed after the other, so that a whole table is there early."""
    for seed in seeds:
        for student in BASE:
            for name, method in METHODS.items() if "methods" in parts else ():
                trial = Trial("methods", name, student, seed, {"method": method})
                if name == "dmd2":
                    half = replace(trial, name="lcd", settings={"method": METHODS["lcd"]}, share=0.5)
                    rate = {"learning_rate": BASE[student]["training"]["learning_rate"] * DMD2_RATE}
                    settings = {**trial.settings, "training": rate}
                    trial = replace(trial, settings=settings, share=0.5, begins_with=half)
                yield trial
    for name, method in COARSE.items() if "coarse" in parts else ():
        for student, share in (("lora", 1.0), ("full", 1.0), ("full", LONGER)):
            yield Trial("coarse", name, student, seeds[0], {"method": method}, share)
    for name, method in ANY_STEP.items() if "any-step" in parts else ():
        yield Trial("any-step", name, "full", seeds[0], {"method": method}, 1.0)
    for skip in (1, 5, 10, 20, 50) if "skip" in parts else ():
        for share in (0.25, 0.5, 1.0):
            yield Trial("skip", f"k = {skip}", "lora", seeds[0], {"method": {"original_steps": 1000 // skip}}, share)
    for w in (2.0, 4.0, PAPER_W, 12.0) if "guidance" in parts else ():
        for kind in ("lcd", "tcd", "segmented") if w == PAPER_W else ("lcd",):
            settings = {"method": {"kind": kind, "w_min": w, "w_max": w}}
            yield Trial("guidance", f"w = {w:g}" + (f", {kind}" if kind != "lcd" else ""), "lora", seeds[0], settings)
    for name, settings in VARIETY.items() if "variety" in parts else ():
        yield Trial("variety", name, "lora", seeds[0], settings)


def configure(trial: Trial, folder: Path, steps: int, args: argparse.Namespace) -> DistillConfig:
    """The settings of a run, as a user would give them."""
    training = {**COMMON, "seed": trial.seed, "steps": steps}
    place = {"teacher": "emoji", "output": str(folder), "device": args.device, "name": "student"}
    data = {"path": "emoji", "cache": str(args.work / "cache")}
    quiet = {"report": {"preview_every": 0, "samples": 0}}
    config = DistillConfig()
    for settings in ({**place, "data": data, "training": training}, BASE[trial.student], trial.settings, quiet):
        config = apply(config, settings, "the benchmark")
    if config.data.path != "emoji":
        config = apply(config, {"data": {"path": str(write_pictures(args.work / "pictures"))}}, "the benchmark")
    if trial.begins_with is not None:
        start = {"start": str(weights(trial.begins_with, args))}
        config = apply(config, {"student": start}, "the benchmark")
    return config


def weights(trial: Trial, args: argparse.Namespace) -> Path:
    """A trained run's result."""
    name = "student_lora.safetensors" if trial.student == "lora" else "student.safetensors"
    folder: Path = args.work / trial.folder
    return folder / name


def count_steps(trial: Trial, args: argparse.Namespace) -> int:
    """How many steps the run's time allows on this machine; decided once."""
    file = args.work / trial.folder / "steps.json"
    if not file.exists():
        scratch = args.work / "rehearsal"
        shutil.rmtree(scratch, ignore_errors=True)
        train_student(examine(configure(trial, scratch, REHEARSAL, args)))
        seconds = [entry["seconds"] for entry in read_log(scratch)[FIRST:]]
        steps = max(1, round(args.seconds * trial.share / (sum(seconds) / len(seconds))))
        write_json(file, steps)
    count: int = json.loads(file.read_text())
    return count


def train(trial: Trial, args: argparse.Namespace, use: Callable[[Model], None] | None = None) -> None:
    """Train, from wherever it was stopped, and let `use` have the student."""
    if trial.begins_with is not None:
        train(trial.begins_with, args)
    folder = args.work / trial.folder
    config = configure(trial, folder, count_steps(trial, args), args)
    if use is not None or not weights(trial, args).exists():
        setup = examine(config)
        student, _ = train_student(setup)
        write_weights(config, student, setup.source, setup.info)
        if use is not None:
            with painter(setup, student, "student") as model:
                use(model)


def spent(trial: Trial, args: argparse.Namespace) -> tuple[int, float]:
    """Samples seen by a run and by the one that it began with, and seconds."""
    samples, seconds = (0, 0.0) if trial.begins_with is None else spent(trial.begins_with, args)
    log = read_log(args.work / trial.folder)
    return samples + len(log) * COMMON["batch_size"], seconds + sum(entry["seconds"] for entry in log)


def read_log(folder: Path) -> list[dict[str, float]]:
    """A run's steps."""
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def write_pictures(folder: Path) -> Path:
    """The drawings that may be trained on as a folder of PNGs with captions, decoded from their shipped latents."""
    latents, captions = load_shipped()
    if not (folder / "metadata.jsonl").exists():
        vae = load_model("emoji", "cpu", unet="teacher").vae
        folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            pixels = torch.cat([vae.decode(part) for part in latents.split(64)])
        for number, image in enumerate(to_pil(pixels)):
            image.save(folder / f"{number:05}.png")
        lines = [json.dumps({"file_name": f"{i:05}.png", "text": text}) + "\n" for i, text in enumerate(captions)]
        (folder / "metadata.jsonl").write_text("".join(lines))
    return folder
