"""`distill`: train a few-step student of a checkpoint. `presets`: print what the presets set."""

from __future__ import annotations

import argparse
from typing import Any

from trainer.options import add_options, describe_presets, resolve

_EPILOG = """examples:
  python -m trainer distill --preset emoji
  python -m trainer distill --preset sd15-lora --teacher my.safetensors --data photos/ --output out/
  python -m trainer distill --preset sd15-lora --teacher my.safetensors --prompts prompts.txt --output out/
  accelerate launch --num_processes 2 -m trainer distill --config out/config.json

Stopped at any moment, the same command goes on where it was. What is given here wins over --config, that over
--preset."""


def add_distill(commands: Any) -> None:
    """Declare both commands."""
    parser = commands.add_parser(
        "distill",
        help="train a LoRA or a full student that paints in 1 to 8 steps",
        description="Distil a Stable Diffusion 1.x, 2.x or XL checkpoint into a few-step student.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan: memory, disk and time; train nothing")
    parser.set_defaults(run=_distill)
    presets = commands.add_parser("presets", help="print what the presets set", description="Every preset, as TOML.")
    presets.set_defaults(run=lambda args: print(describe_presets()))


def _distill(args: argparse.Namespace) -> None:
    config = resolve(args)
    if args.dry_run:
        from trainer.estimate import print_plan

        print_plan(config)
    else:
        from trainer.run import run

        run(config)
