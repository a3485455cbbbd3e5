"""`compare`: one labelled grid, the teacher at its steps beside the LCM at its own."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.cli.common import (
    Progress,
    add_command,
    add_model_options,
    check_output,
    load_pipeline,
    parse_size,
    plural,
    read_options,
)
from lcm_core.errors import InputError
from lcm_core.files.reading import check_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcm_core.pipeline import PictureOptions, Pipeline


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "compare",
        "Paint one grid: the teacher at 25 and 4 steps beside the LCM at 1, 2, 4 and 8.",
        'compare "a panda, noto style" "a rocket, noto style" --output grid.png',
    )
    parser.set_defaults(run=run)
    parser.add_argument("prompts", nargs="+", metavar="prompt", help="one row for each prompt")
    parser.add_argument("--output", type=Path, default=Path("compare.png"), help="picture (default compare.png)")
    parser.add_argument("--seed", type=int, default=0, help="of every picture (default 0)")
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="of every picture (default: the model's)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="of the LCM (default 1 2 4 8)")
    parser.add_argument("--teacher-steps", type=int, nargs="+", default=[25, 4], help="default 25 4")
    parser.add_argument("--guidance", type=float, help="of the LCM (default: the model's)")
    parser.add_argument("--teacher-guidance", type=float, help="of the teacher (default: the model's)")
    parser.add_argument(
        "--teacher", metavar="MODEL", help="the teacher's model (default: the same model's, without its LoRA)"
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Paint all pictures of the teacher, then all of the LCM (one model in memory at a time), and lay them out."""
    from lcm_core.pipeline.image import IMAGE_SUFFIXES, check_storable, labelled_grid, save_image

    if args.output.suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(f"--output {args.output}: unknown kind of picture; use {', '.join(IMAGE_SUFFIXES)}")
    check_output(args.output)
    lcm = read_options(args)
    for prompt in args.prompts:
        check_text("prompt", prompt)
    columns = [f"teacher, {plural(steps, 'step')}" for steps in args.teacher_steps]
    columns += [f"LCM, {plural(steps, 'step')}" for steps in args.steps]
    settings = {"command": "compare", "prompts": args.prompts, "seed": args.seed, "columns": columns}
    check_storable(args.output, settings)
    teacher_columns = _columns(args, _teacher(args, lcm), "teacher", args.teacher_steps, args.teacher_guidance)
    lcm_columns = _columns(args, lcm, "LCM", args.steps, args.guidance)
    rows = list(zip(*teacher_columns, *lcm_columns, strict=True))
    save_image(labelled_grid(rows, columns, args.prompts), args.output, settings)
    print(f"{args.output}: {len(rows)} x {len(columns)} pictures, seed {args.seed}")


def _teacher(args: argparse.Namespace, lcm: PictureOptions) -> PictureOptions:
    """The teacher's options."""
    if args.teacher is not None:
        return replace(lcm, model=args.teacher, lora=None, unet=None)
    if args.lora:
        return replace(lcm, lora=None)
    from lcm_core.pipeline.sources import CARD, find_model

    if (find_model(args.model or "emoji") / CARD).is_file():
        return replace(lcm, unet="teacher")
    raise InputError(f"no teacher is known for {args.model}; give --teacher MODEL, or the LCM as --lora of its teacher")


def _columns(
    args: argparse.Namespace, options: PictureOptions, label: str, steps: list[int], guidance: float | None
) -> list[list[Image]]:
    """The columns: for each number of steps, one picture for each prompt."""
    pipe, _ = load_pipeline(options)
    sampler = "lcm" if label == "LCM" else "dpmpp_2m"
    common = replace(options, guidance_scale=guidance, sampler=sampler)
    pictures = [pipe.resolve(replace(common, num_inference_steps=number)) for number in steps]
    with Progress(sum(steps) * len(args.prompts), label) as progress:
        return [_column(pipe, settings, args.prompts, progress) for settings in pictures]


def _column(pipe: Pipeline, settings: Any, prompts: list[str], progress: Progress) -> list[Image]:
    return list(pipe.paint([replace(settings, prompt=prompt) for prompt in prompts], callback=progress.step))
