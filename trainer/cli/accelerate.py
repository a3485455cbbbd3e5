"""`accelerate`: make my LoRA fast."""

from __future__ import annotations

import argparse
from typing import Any

from trainer.options import add_options, resolve

_EPILOG = """examples:
  python -m trainer accelerate --teacher base.safetensors --lora style.safetensors --prompts prompts.txt
  python -m trainer accelerate --teacher sdxl.safetensors --lora style.safetensors:0.8 --prompts prompts.txt --dry-run

Two files come out: NAME_lora.safetensors, the style and the speed in one, and NAME_patch.safetensors, the speed alone,
to be used beside the style. Everything else is as for `distill`: stopped at any moment, the same command goes on."""


def add_accelerate(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "accelerate",
        help="make a style LoRA paint in 4 steps",
        description="Turn a checkpoint and a style LoRA into a LoRA that paints in that style in 4 steps, from prompts "
        "alone, and say how much of the style it keeps.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan: memory, disk and time; train nothing")
    parser.set_defaults(run=_accelerate)


def _accelerate(args: argparse.Namespace) -> None:
    from trainer.accelerate import METHOD, usual_settings

    config = resolve(args, usual_settings(resolve(args, METHOD)))
    if args.dry_run:
        from trainer.estimate import print_plan

        print_plan(config)
    else:
        from trainer.run import run

        run(config)
