"""Ways to distil, side by side: one teacher, one data set, one budget, several seeds, one table.

    python benchmarks/quality.py                          # everything; hours on a CPU, minutes on a GPU
    python benchmarks/quality.py --parts methods --seeds 0 --seconds 300
    python benchmarks/quality.py --show                   # only draw and print what is there

The teacher is the embedded model's, the data are its drawings without the held-out pairs. Each run trains for
`--seconds`, on this machine, in as many steps as a rehearsal says, and is then scored on the embedded benchmark. What
is measured stands in `results.csv`, and is not measured again: the same command goes on where it stopped, also on
another machine. Parts:

    floor      the drawings that the captions are of, and what the VAE makes of them: nobody can paint better than that
    solvers    the teacher itself, with each of its solvers
    embedded   the embedded LCM and LCM-LoRA, which were trained for longer than the runs below
    methods    each method as LoRA and as full model; dmd2 spends half of its time as lcd
    coarse     tcd and segmented with skip k = 100 and 125; as full models also for five times as long
    any-step   a full student that is told where a jump ends
    skip       lcd with skip k = 1, 5, 10, 20, 50, after a quarter, half and all of the time
    guidance   lcd with w = 2, 4, 8, 12; with w = 8, as in the paper's tables, also tcd, segmented and the solvers
    variety    lcd with other noise schedules, and with augmented pictures beside plain ones
    noise      the embedded models from start noise that nobody trained on: scaled, coloured, quantised
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from quality_report import show
from quality_trials import PAPER_W, Trial, Values, list_trials, spent, train
from torch import Tensor
from torch.nn import functional

from lcm_core.files.atomic import atomic_write
from lcm_core.pipeline.model import Model, load_model
from trainer.evaluate.scores import Evaluation, benchmark_evaluation, evaluate_rows, grade
from trainer.machine import describe_machine
from trainer.recipes.emoji.benchmark import Benchmark, load_benchmark
from trainer.recipes.emoji.data import load_shipped
from trainer.report.preview import paint_previews

PARTS = ("floor", "solvers", "embedded", "methods", "coarse", "any-step", "skip", "guidance", "variety", "noise")
EMBEDDED_PARTS = {"solvers", "embedded", "guidance", "noise"}
"""The parts that measure the embedded models."""
STEPS = (1, 2, 4, 8)
SOLVERS = {"euler": "DDIM", "dpm_2m": "DPM", "dpmpp_2m": "DPM++"}
PROMPTS = ("pizza, noto style", "red heart, fluent style", "octopus, twemoji style", "grinning face, noto style")


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
class Table:
    """Everything that was measured, in a CSV file."""

    file: Path
    labels: Sequence[str] = ("part", "name", "student", "seed", "share")
    """The columns that say what a line is about."""

    @property
    def rows(self) -> list[dict[str, str]]:
        """All lines."""
        if not self.file.exists():
            return []
        with self.file.open(newline="") as stream:
            return list(csv.DictReader(stream))

    def has(self, *labels: object, **more: object) -> bool:
        """Whether there are lines with these labels, and with more that they say."""
        wanted = {**dict(zip(self.labels, labels, strict=True)), **more}
        return any(all(row[column] == str(value) for column, value in wanted.items()) for row in self.rows)

    def add(self, labels: Sequence[object], cost: Values, scores: Sequence[Values]) -> None:
        """More lines, which have labels and cost in common."""
        about = {**dict(zip(self.labels, labels, strict=True)), **cost}
        everything = [*self.rows, *({**about, **row} for row in scores)]
        with atomic_write(self.file) as temporary, temporary.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(everything[-1]), restval="")
            writer.writeheader()
            writer.writerows(everything)


def run_trial(trial: Trial, table: Table, evaluation: Evaluation, args: argparse.Namespace) -> None:
    """Train and score one run, unless that was done."""
    labels = (trial.part, trial.name, trial.student, trial.seed, f"{trial.whole:g}")
    missing = [steps for steps in STEPS if not table.has(*labels, steps=steps)]
    if not missing:
        return
    guidance = 1.0 if trial.student == "lora" else 2.0

    def use(model: Model) -> None:
        cost = describe_cost(args, *spent(trial, args))
        for steps in missing:
            table.add(labels, cost, score(trial.name, model, evaluation, [steps], guidance_scale=guidance))
        if trial.part == "methods":
            save_pictures(args.work / "samples" / f"{trial.name} {trial.student}", model, guidance)

    train(trial, args, use)
    (args.work / trial.folder / "run" / "state.safetensors").unlink()  # large, and done with


def score(name: str, model: Model, evaluation: Evaluation, steps: Sequence[int], **options: Any) -> list[Values]:
    """Scores at each number of steps."""
    rows = evaluate_rows(name, model, evaluation, steps, progress=True, **options)
    return [{key: value for key, value in row.items() if key != "model"} for row in rows]


def describe_cost(args: argparse.Namespace, samples: int = 0, seconds: float = 0.0) -> Values:
    """What a line took, and where."""
    machine = ", ".join(describe_machine(torch.device(args.device)).values())
    return {"samples_seen": samples, "seconds": f"{seconds:.0f}", "pictures": args.samples, "machine": machine}


def run_embedded(table: Table, evaluation: Evaluation, args: argparse.Namespace) -> None:
    """What is embedded, without training: the teacher under its solvers, the students, and all from other noise."""
    device = torch.device(args.device)
    teacher = load_model("emoji", device, unet="teacher")
    usual = teacher.settings("euler")
    guided, strong = {"guidance_scale": usual.guidance_scale}, {"guidance_scale": 1 + PAPER_W}
    full, lora = load_model("emoji", device), load_model("emoji", device, unet="teacher", lora=[("lcm_lora", 1.0)])

    def measure(
        part: str,
        name: str,
        student: str,
        model: Model,
        steps: int,
        evaluation: Evaluation = evaluation,
        **options: Any,
    ) -> None:
        labels = (part, name, student, 0, "1")
        if part in args.parts and not table.has(*labels, steps=steps):
            table.add(labels, describe_cost(args), score(name, model, evaluation, [steps], **options))

    for sampler, name in SOLVERS.items():
        for steps in (*STEPS, usual.num_inference_steps):
            measure("solvers", name, "teacher", teacher, steps, sampler=sampler, **guided)
            measure("guidance", f"w = {PAPER_W:g}, {name}", "teacher", teacher, steps, **strong, sampler=sampler)
    for steps in STEPS:
        measure("embedded", "LCM", "full", full, steps)
        measure("embedded", "LCM-LoRA", "lora", lora, steps)
    for name, change in {"as trained": None, **NOISES}.items():
        other = replace(evaluation, change_noise=change)
        measure("noise", name, "teacher", teacher, 4, other, **guided)
        for steps in (1, 4):
            measure("noise", name, "full", full, steps, other)
            measure("noise", name, "lora", lora, steps, other)


def run_floor(table: Table, evaluation: Evaluation, benchmark: Benchmark, args: argparse.Namespace) -> None:
    """The real drawings in the place of painted ones. Held-out ones, whose latents are not shipped, miss the VAE."""
    real = benchmark.real[benchmark.chosen]
    latents, captions = load_shipped()
    shipped = {caption: row for row, caption in enumerate(captions)}
    rows = [(i, shipped[caption]) for i, caption in enumerate(evaluation.captions) if caption in shipped]
    model = load_model("emoji", torch.device(args.device), unet="teacher")
    decoded = real.clone()
    for part in torch.tensor(rows).split(64):
        places, picks = part.unbind(1)
        with torch.no_grad():
            pixels = model.vae.decode(latents[picks].to(model.device))
        decoded[places] = evaluation.features(((pixels.cpu() + 1) * 127.5).round().clamp(0, 255).byte())
    nothing = {"sampler": "", "steps": 0, "guidance_scale": 0, "images_per_second": 0}
    for name, features in (("drawings", real), ("through the VAE", decoded)):
        table.add(("floor", name, "real", 0, "1"), describe_cost(args), [nothing | grade(evaluation, features)])


def save_pictures(folder: Path, model: Model, guidance_scale: float) -> None:
    """A few pictures of a student at each number of steps, for the grid."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = paint_previews(model, PROMPTS, range(len(PROMPTS)), STEPS, guidance_scale=guidance_scale)
    for steps, column in columns.items():
        for number, (image, _) in enumerate(column):
            image.save(folder / f"{number}-{steps}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to compare (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the methods (default: 0 1 2)")
    parser.add_argument("--seconds", type=float, default=600, help="of training for each run (default: 600)")
    parser.add_argument("--samples", type=int, default=2048, help="pictures behind each line (default: 2048)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder of the runs")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "quality", help="folder of the table, plot and pictures"
    )
    parser.add_argument("--show", action="store_true", help="measure nothing, only draw and print")
    args = parser.parse_args()
    table = Table(args.output / "results.csv")
    if not args.show:
        benchmark = load_benchmark(args.samples)
        evaluation = benchmark_evaluation(benchmark)
        if "floor" in args.parts and not table.has("floor", "drawings", "real", 0, "1"):
            run_floor(table, evaluation, benchmark, args)
        if not EMBEDDED_PARTS.isdisjoint(args.parts):
            run_embedded(table, evaluation, args)
        for trial in list_trials(args.parts, args.seeds):
            run_trial(trial, table, evaluation, args)
    show(table.rows, args.output, args.work / "samples", PROMPTS)


if __name__ == "__main__":
    main()
