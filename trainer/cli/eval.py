"""`eval`: score any checkpoint or LoRA, on the benchmark or against the user's own pictures."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.cli.common import add_model_options, check_output, load_pipeline, note, plural, read_options
from lcm_core.errors import InputError

if TYPE_CHECKING:
    from lcm_core.pipeline.model import Model
    from trainer.distributed import Processes
    from trainer.evaluate.scores import Evaluation

_EPILOG = """examples:
  python -m trainer eval --output scores
  python -m trainer eval --model base.safetensors --lora my_lora.safetensors --data photos --clip clip-vit-base-patch16
  accelerate launch --num_processes 4 -m trainer eval --model my.safetensors

The same --output collects several models in one table, and goes on where it was interrupted."""


def add_eval(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "eval",
        help="score a checkpoint or LoRA: Frechet distance, recall, alignment",
        description="Paint pictures at 1, 2, 4 and 8 steps and score them: on the emoji benchmark, or against a folder "
        "of your own pictures with captions. Nothing is downloaded.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="one row each (default: 1 2 4 8)")
    parser.add_argument("--sampler", help="lcm, tcd, euler, dpmpp_2m or dpm_2m (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--samples", type=int, default=2048, help="pictures behind each row (default: 2048)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="your own pictures with captions, as for `distill`")
    parser.add_argument(
        "--inception", type=Path, metavar="FILE", help="torch-fidelity's Inception weights as safetensors, for FID"
    )
    parser.add_argument("--clip", type=Path, metavar="FOLDER", help="a transformers CLIP model, for the CLIP score")
    parser.add_argument("--name", help="of the model in the table (default: its file names)")
    parser.add_argument("--output", type=Path, default=Path("eval"), help="folder of eval.json and eval.md")
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Score the model and add its rows to the table in --output."""
    from lcm_core.networks.device import choose_device
    from lcm_core.pipeline.options import PictureOptions
    from trainer.distributed import join_processes
    from trainer.evaluate.scores import check_samples, evaluate_rows
    from trainer.evaluate.share import from_main

    _check(args)
    processes = join_processes(choose_device(args.device))
    check_samples(args.samples, processes)
    pipe, _ = load_pipeline(replace(read_options(args), device=str(processes.device)))
    model, name = pipe.model, args.name or _name(args)
    evaluation = _evaluation(args, model, processes)
    if processes.is_main and not model.recommended.is_distilled and args.sampler is None:
        note(f"{model.name} looks like a plain model; use --sampler dpmpp_2m --steps 25 for a teacher")
    options = {"sampler": args.sampler, "guidance_scale": args.guidance}
    about = {"model": model.name, **model.origin}
    table = from_main(processes, lambda: _open_table(args.output / "eval.json", evaluation, name, about))
    for steps in args.steps:
        settings = pipe.resolve(PictureOptions(num_inference_steps=steps, **options))
        line = (name, settings.sampler, steps, settings.guidance_scale)
        if line in [(row["model"], row["sampler"], row["steps"], row["guidance_scale"]) for row in table["rows"]]:
            if processes.is_main:
                note(f"{name} at {plural(steps, 'step')} was measured before; remove {args.output} to do it again")
            continue
        table["rows"] += evaluate_rows(
            name, model, evaluation, [steps], processes, progress=processes.is_main, **options
        )
        if processes.is_main:
            _write(args.output, table, evaluation)
    if processes.is_main:
        print(f"{_to_text(table, evaluation)}\n{args.output / 'eval.json'}, {args.output / 'eval.md'}")


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    if args.inception is not None and args.data is None:
        raise InputError("--inception compares with your own pictures; give them with --data FOLDER")
    for flag, path in (("--data", args.data), ("--inception", args.inception), ("--clip", args.clip)):
        if path is not None and not path.exists():
            raise InputError(f"{flag} {path} does not exist; check the path")
    check_output(args.output / "eval.json")


def _name(args: argparse.Namespace) -> str:
    base = Path(args.model or "emoji").stem + (f" ({args.unet})" if args.unet else "")
    loras = [f"{Path(path).stem}" + (f":{strength:g}" if strength != 1 else "") for path, strength in args.lora or ()]
    return " + ".join([base, *loras])


def _evaluation(args: argparse.Namespace, model: Model, processes: Processes) -> Evaluation:
    from functools import partial

    from trainer.data.sources import read_source
    from trainer.evaluate.pretrained import load_clip, load_inception
    from trainer.evaluate.scores import benchmark_evaluation, folder_evaluation, read_pictures
    from trainer.recipes.emoji.benchmark import load_benchmark
    from trainer.recipes.emoji.features import extract

    caption_score = None if args.clip is None else load_clip(args.clip, processes.device)
    benchmark = load_benchmark(args.samples)
    benchmark.features.to(processes.device)
    if args.data is None:
        return benchmark_evaluation(benchmark, caption_score)
    features = (
        partial(extract, benchmark.features)
        if args.inception is None
        else load_inception(args.inception, processes.device)
    )
    source = read_source(args.data)
    pictures = read_pictures(source.items, (model.resolution, model.resolution), features, processes)
    skipped = [*source.skipped, *pictures.skipped]
    for name, reason in skipped if processes.is_main else ():
        note(f"skipped {name}: {reason}")
    about = {"data": str(args.data), "skipped": [list(entry) for entry in skipped]}
    return folder_evaluation(pictures, args.samples, features, args.inception is not None, caption_score, about)


def _open_table(path: Path, evaluation: Evaluation, name: str, about: dict[str, Any]) -> dict[str, Any]:
    """What earlier runs measured with this evaluation, with this model among those that have rows.

    Raises:
        InputError: they took another evaluation, or another model goes by this name.
    """
    from lcm_core.files.safetensors import read_json

    table: dict[str, Any] = (
        read_json(path) if path.exists() else {"evaluation": evaluation.note, "models": {}, "rows": []}
    )
    if table.get("evaluation") != evaluation.note:
        raise InputError(f"{path} was measured with other pictures or features; choose another --output")
    if table["models"].setdefault(name, about) != about:
        raise InputError(f"{path} has another model called {name}; tell them apart with --name")
    return table


def _write(folder: Path, table: dict[str, Any], evaluation: Evaluation) -> None:
    from lcm_core.files.safetensors import write_json
    from lcm_core.pipeline.image import write_bytes

    write_json(folder / "eval.json", table)
    write_bytes(folder / "eval.md", _to_text(table, evaluation).encode())


def _to_text(table: dict[str, Any], evaluation: Evaluation) -> str:
    from trainer.report.tables import remark, to_markdown

    return f"{to_markdown(table['rows'])}\n{remark(evaluation.note, evaluation.distance)}\n"
