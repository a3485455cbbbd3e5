"""The trainer's command line: `python -m trainer distill | accelerate | cache | eval | presets | recipe`.

Importing this loads neither torch nor any other library, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lcm_core.cli.imports import leave_out_unused
from lcm_core.cli.main import Parser, run_command
from trainer.cli.accelerate import add_accelerate
from trainer.cli.cache import add_cache
from trainer.cli.distill import add_distill
from trainer.cli.eval import add_eval


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands; `parse_args(...).run` is the chosen command's function."""
    parser = Parser(prog="python -m trainer", description="Distil diffusion models into few-step ones.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_distill(commands)
    add_accelerate(commands)
    add_cache(commands)
    add_eval(commands)
    _add_recipe(commands)
    return parser


def start() -> NoReturn:
    """Run this process's command line, and end it."""
    leave_out_unused()
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 2 for a mistake in the input, 130 when interrupted."""
    return run_command(
        build_parser().parse_args(argv),
        interrupted="interrupted; what was learnt is saved: run the same command again to go on",
        out_of_memory="use --gradient-checkpointing, more --accumulation, or a smaller --resolution; "
        "the same command goes on where it was",
    )


def _add_recipe(commands: Any) -> None:
    parser = commands.add_parser(
        "recipe",
        help="make a model from public data: the embedded one, or a small class-conditional teacher",
        description="emoji: from the emoji packages to the embedded model's weights, stage by stage. classes: a small "
        "teacher that paints by the group of emoji, from the embedded model's own latents. Stopped at any moment, the "
        "same command goes on where it was.",
        epilog="example: python -m trainer recipe emoji --work runs/emoji --output runs/emoji/model",
    )
    parser.add_argument("name", choices=["emoji", "classes"], help="which recipe")
    parser.add_argument("--work", type=Path, help="folder of all stages (default: runs/NAME)")
    parser.add_argument("--output", type=Path, help="folder of the finished model (default: WORK/model)")
    parser.add_argument("--size", type=int, choices=[64, 128], default=128, help="pixels (default: 128)")
    parser.add_argument("--icons", type=Path, help="node_modules with the icon packages (default: fetched with npm)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument("--effort", type=float, default=1.0, help="multiplies every stage's steps (default: 1)")
    parser.add_argument(
        "--batch-scale",
        type=int,
        default=1,
        metavar="N",
        help="batches N times as large, in as many fewer steps of what is left; about 8 for a GPU (default: 1)",
    )
    parser.add_argument("--samples", type=int, default=2048, help="pictures behind each line of the table")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that prepare batches while a GPU computes (default: 0)",
    )
    parser.set_defaults(run=_run_recipe)


def _run_recipe(args: argparse.Namespace) -> None:
    work = args.work or Path("runs", args.name)
    output = args.output or work / "model"
    if args.name == "classes":
        from trainer.recipes import classes

        classes.run(classes.Options(work, output, args.device, args.effort))
        return
    from trainer.recipes.emoji.recipe import Options, run

    run(
        Options(
            work=work,
            output=output,
            size=args.size,
            icons=args.icons,
            device=args.device,
            effort=args.effort,
            batch_scale=args.batch_scale,
            samples=args.samples,
            workers=args.workers,
        )
    )
