"""`cache`: everything that training reads, computed beforehand; `distill` with the same options then starts at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lcm_core.cli.common import note, plural
from lcm_core.errors import InputError
from trainer.options import add_options, resolve

_EPILOG = """examples:
  python -m trainer cache --teacher my.safetensors --data photos/ --output out/
  python -m trainer cache --teacher my.safetensors --data photos/ --cache /big/cache --flip
  accelerate launch --num_processes 4 -m trainer cache --config out/config.json

Takes the options of `distill`, of which those of the data count. Stopped at any moment, the same command goes on where
it was; several processes, on one machine or on several that see the same folder, share the work."""


def add_cache(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "cache",
        help="compute latents and text embeddings before training",
        description="Put images through augmentation and the VAE, and captions through the text encoders, once; or, "
        "for prompts alone, let the teacher paint them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Fill the cache and say what is in it."""
    config = resolve(args)
    if not config.teacher:
        raise InputError("no teacher was given; give --teacher, whose VAE and text encoders are used")
    if not config.output and not config.data.cache:
        raise InputError("no folder was given; give --output as for distill, or --cache")
    from lcm_core.networks.device import choose_device
    from trainer.data.cache import prepare
    from trainer.distributed import join_processes
    from trainer.setup import teacher_of

    folder = Path(config.data.cache or Path(config.output, "cache"))
    processes = join_processes(choose_device(config.device or None))
    teacher = teacher_of(config)
    cache = prepare(config.data, teacher, folder, processes.device, processes, config.prediction_type)
    if not processes.is_main:
        return
    for line in cache.notes:
        note(line)
    captions, sizes = plural(cache.caption_count, "caption"), plural(len(cache.buckets), "size")
    print(f"{folder}: {plural(len(cache), 'picture')} of {sizes}, {captions}, {len(cache.skipped)} skipped")
