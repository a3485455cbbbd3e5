"""Ways to distil, side by side: one teacher, one data set, one budget, several seeds, one table.

    python benchmarks/quality.py                          # everything; hours on a CPU, minutes on a GPU
    python benchmarks/quality.py --parts methods --seeds 0 --seconds 300
    python benchmarks/quality.py --show                   # only draw and print what is there

The teacher is the embedded model's, the data are its drawings without the held-out pairs. Each run trains for
`--seconds`, on this machine, in as many steps as a rehearsal says, and is then scored on the embedded benchmark. What
is measured stands in `results.csv`, and is not measured again: the same command goes on where it stopped, also on
another machine. Parts:

    solvers    the teacher itself, with each of its solvers
    methods    each method as LoRA and as full model; dmd2 spends half of its time as lcd
    skip       lcd with skip k = 1, 5, 10, 20, 50, after a quarter, half and all of the time
    guidance   lcd with w = 2, 4, 8, 12
    variety    lcd with other noise schedules, and with augmented pictures beside plain ones
    noise      lcd and the teacher from start noise that nobody trained on: scaled, coloured, quantised
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from quality_report import show
from torch import Tensor
from torch.nn import functional

from lcm_core.files import atomic_write
from lcm_core.image import to_pil
from lcm_core.loading import Model, load_model
from trainer.config import DistillConfig
from trainer.emoji.data import load_shipped
from trainer.emoji.evaluate import load_benchmark
from trainer.evaluate import Exam, benchmark_exam, evaluate_rows
from trainer.machine import describe_machine
from trainer.options import apply
from trainer.outputs import write_weights
from trainer.preview import paint_previews
from trainer.run import learn
from trainer.show import painter

Settings = dict[str, Any]
PARTS = ("solvers", "methods", "skip", "guidance", "variety", "noise")
STEPS = (1, 2, 4, 8)
PROMPTS = ("pizza, noto style", "red heart, fluent style", "octopus, twemoji style", "grinning face, noto style")
BASE: dict[str, Settings] = {
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
COMMON: Settings = {"batch_size": 32, "warmup_steps": 20, "cooldown": 0.5, "ema_decay": 0.95, "tensorboard": False}
METHODS: dict[str, Settings] = {
    "lcd": {"kind": "lcd"},
    "tcd": {"kind": "tcd"},
    "segmented": {"kind": "segmented"},
    "finetune": {"kind": "finetune", "loss": "cauchy", "huber_c": 0.0, "diffusion_weight": 1.0, "pair_noise": True},
    "dmd2": {"kind": "dmd2"},
}
DMD2_RATE = 0.2
"""dmd2's learning rate, as a share of the others'."""
VARIETY: dict[str, Settings] = {
    "lognormal timesteps": {"method": {"timestep_sampling": "lognormal"}},
    "jittered timesteps": {"method": {"grid_jitter": True}},
    "noise offset": {"method": {"noise_offset": 0.1}},
    "plain pictures": {"data": {"path": "pictures"}},
    "augmented pictures": {"data": {"path": "pictures", "crop": 0.85, "colour": 0.1, "flip": True, "variants": 4}},
}
REHEARSAL, FIRST = 12, 2
"""Steps that tell how long one takes, and how many of them do not count. dmd2's student learns in every fifth."""


def coloured(noise: Tensor) -> Tensor:
    """Noise whose neighbours resemble each other, of the same spread."""
    smooth = functional.avg_pool2d(functional.pad(noise, (1, 1, 1, 1), mode="reflect"), 3, 1)
    mixed = noise + smooth
    return mixed / mixed.std() * noise.std()


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled by 0.8": lambda noise: 0.8 * noise,
    "scaled by 1.2": lambda noise: 1.2 * noise,
    "coloured": coloured,
    "quantised": lambda noise: noise.mul(2).round().div(2),
}


@dataclass(frozen=True)
class Trial:
    """One training run."""

    part: str
    name: str
    student: str
    seed: int
    settings: Settings = field(default_factory=dict)
    share: float = 1.0
    """Of the time that it trains."""
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
    for skip in (1, 5, 10, 20, 50) if "skip" in parts else ():
        for share in (0.25, 0.5, 1.0):
            yield Trial("skip", f"k = {skip}", "lora", seeds[0], {"method": {"original_steps": 1000 // skip}}, share)
    for w in (2.0, 4.0, 8.0, 12.0) if "guidance" in parts else ():
        yield Trial("guidance", f"w = {w:g}", "lora", seeds[0], {"method": {"w_min": w, "w_max": w}})
    for name, settings in VARIETY.items() if "variety" in parts else ():
        yield Trial("variety", name, "lora", seeds[0], settings)


class Bench:
    """The table and everything that is made for it.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work, self.file = args, args.work, args.output / "results.csv"
        self.exam: Exam = benchmark_exam(load_benchmark(args.samples))
        self.machine = ", ".join(describe_machine(torch.device(args.device)).values())

    @property
    def rows(self) -> list[dict[str, str]]:
        """The table so far."""
        if not self.file.exists():
            return []
        with self.file.open(newline="") as stream:
            return list(csv.DictReader(stream))

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """More lines for the table."""
        everything = [*self.rows, *rows]
        with atomic_write(self.file) as temporary, temporary.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(everything[-1]), restval="")
            writer.writeheader()
            writer.writerows(everything)

    def has(self, part: str, name: str, student: str, seed: int, share: float = 1.0) -> bool:
        """Whether these lines were measured."""
        key = [part, name, student, str(seed), f"{share:g}"]
        return any([row[c] for c in ("part", "name", "student", "seed", "share")] == key for row in self.rows)

    def config(self, trial: Trial, folder: Path, steps: int) -> DistillConfig:
        """The settings of a run, as a user would give them."""
        training = {**COMMON, "seed": trial.seed, "steps": steps}
        place = {"teacher": "emoji", "output": str(folder), "device": self.args.device, "name": "student"}
        data = {"path": "emoji", "cache": str(self.work / "cache")}
        config = apply(DistillConfig(), {**place, "data": data, "training": training}, "the benchmark")
        config = apply(config, BASE[trial.student], "the benchmark")
        config = apply(config, trial.settings, "the benchmark")
        config = apply(config, {"report": {"preview_every": 0, "samples": 0}}, "the benchmark")
        if config.data.path != "emoji":
            config = apply(config, {"data": {"path": str(write_pictures(self.work / "pictures"))}}, "the benchmark")
        if trial.begins_with is not None:
            config = apply(config, {"student": {"start": str(self.weights(trial.begins_with))}}, "the benchmark")
        return config

    def weights(self, trial: Trial) -> Path:
        """A trained run's result."""
        return (
            self.work
            / trial.folder
            / ("student_lora.safetensors" if trial.student == "lora" else "student.safetensors")
        )

    def count_steps(self, trial: Trial) -> int:
        """How many steps the run's time allows here; decided once."""
        file = self.work / trial.folder / "steps.json"
        if not file.exists():
            scratch = self.work / "rehearsal"
            shutil.rmtree(scratch, ignore_errors=True)
            learn(self.config(trial, scratch, REHEARSAL))
            seconds = [entry["seconds"] for entry in read_log(scratch)[FIRST:]]
            steps = max(1, round(self.args.seconds * trial.share / (sum(seconds) / len(seconds))))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(steps))
        count: int = json.loads(file.read_text())
        return count

    def train(self, trial: Trial, paint: Callable[[Model], None] | None = None) -> tuple[int, float]:
        """Train, from wherever it was stopped, and let `paint` use the student. Returns samples seen and seconds."""
        samples, seconds = (0, 0.0) if trial.begins_with is None else self.train(trial.begins_with)
        folder = self.work / trial.folder
        config = self.config(trial, folder, self.count_steps(trial))
        if paint is not None or not self.weights(trial).exists():
            setup, student, _ = learn(config)
            write_weights(config, student, setup.source, setup.info)
            if paint is not None:
                with painter(setup, student, "student") as model:
                    paint(model)
        log = read_log(folder)
        return samples + len(log) * config.training.batch_size, seconds + sum(entry["seconds"] for entry in log)

    def run(self, trial: Trial) -> None:
        """Train and score one run, unless that was done."""
        if self.has(trial.part, trial.name, trial.student, trial.seed, trial.whole):
            return
        rows: list[dict[str, Any]] = []
        noisy = trial.part == "methods" and trial.name == "lcd" and trial.student == "lora"

        def paint(model: Model) -> None:
            guidance = 1.0 if trial.student == "lora" else 2.0
            rows.extend(self.score(trial.name, model, STEPS, guidance_scale=guidance))
            save_pictures(self.work / "samples" / f"{trial.name} {trial.student}", model, guidance)
            if noisy and "noise" in self.args.parts and trial.seed == self.args.seeds[0]:
                self.score_noises(f"{trial.name} {trial.student}", model, (1, 4), guidance_scale=guidance)

        samples, seconds = self.train(trial, paint)
        labels = self.label(trial.part, trial.name, trial.student, trial.seed, trial.whole, samples, seconds)
        self.add([{**labels, **row} for row in rows])
        (self.work / trial.folder / "run" / "state.safetensors").unlink()  # large, and done with

    def score(self, name: str, model: Model, steps: Sequence[int], **options: Any) -> list[dict[str, Any]]:
        """Lines without their labels."""
        rows = evaluate_rows(name, model, self.exam, steps, progress=True, **options)
        return [{key: value for key, value in row.items() if key != "model"} for row in rows]

    def label(
        self, part: str, name: str, student: str, seed: int, share: float, samples: int, seconds: float
    ) -> Settings:
        """The columns that say what a line is about."""
        about = {"part": part, "name": name, "student": student, "seed": seed, "share": f"{share:g}"}
        return {
            **about,
            "samples_seen": samples,
            "seconds": f"{seconds:.0f}",
            "pictures": self.args.samples,
            "machine": self.machine,
        }

    def score_noises(self, name: str, model: Model, steps: Sequence[int], **options: Any) -> None:
        """A model from start noise of other kinds, and of its own."""
        plain = self.exam
        for kind, change in {"as trained": None, **NOISES}.items():
            if not self.has("noise", kind, name, 0):
                self.exam = replace(plain, change_noise=change)
                labels = self.label("noise", kind, name, 0, 1.0, 0, 0.0)
                self.add([{**labels, **row} for row in self.score(f"{name}, {kind}", model, steps, **options)])
        self.exam = plain

    def run_solvers(self) -> None:
        """The teacher under its own solvers, and from other noise."""
        model = load_model("emoji", torch.device(self.args.device), unet="teacher")
        for sampler, name in (("euler", "DDIM"), ("dpmpp_2m", "DPM++")) if "solvers" in self.args.parts else ():
            for steps in (*STEPS, 25):
                if not self.has("solvers", f"{name} {steps}", "teacher", 0):
                    rows = self.score(
                        name, model, [steps], sampler=sampler, guidance_scale=model.teacher_guidance_scale
                    )
                    labels = self.label("solvers", f"{name} {steps}", "teacher", 0, 1.0, 0, 0.0)
                    self.add([{**labels, **rows[0]}])
        if "noise" in self.args.parts:
            options = {"sampler": "dpmpp_2m", "guidance_scale": model.teacher_guidance_scale}
            self.score_noises("teacher", model, (4,), **options)


def read_log(folder: Path) -> list[dict[str, float]]:
    """A run's steps."""
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def save_pictures(folder: Path, model: Model, guidance_scale: float) -> None:
    """A few pictures of a student at each number of steps, for the grid."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = paint_previews(model, PROMPTS, range(len(PROMPTS)), STEPS, guidance_scale=guidance_scale)
    for steps, column in columns.items():
        for number, (image, _) in enumerate(column):
            image.save(folder / f"{number}-{steps}.png")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to compare (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the methods (default: 0 1 2)")
    parser.add_argument("--seconds", type=float, default=600, help="of training for each run (default: 600)")
    parser.add_argument("--samples", type=int, default=2048, help="pictures behind each line (default: 2048)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--work", type=Path, default=Path("work/quality"), help="folder of the runs")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "quality", help="folder of the table, plot and pictures"
    )
    parser.add_argument("--show", action="store_true", help="measure nothing, only draw and print")
    args = parser.parse_args()
    bench = Bench(args)
    if not args.show:
        bench.run_solvers()
        for trial in list_trials(args.parts, args.seeds):
            bench.run(trial)
    show(bench.rows, args.output, args.work / "samples", PROMPTS)


if __name__ == "__main__":
    main()
