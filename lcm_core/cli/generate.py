"""`generate`: pictures from a prompt, an input image, or the settings inside an earlier picture."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.cli.common import (
    Progress,
    add_command,
    add_model_options,
    add_settings_options,
    check_output,
    load_pipeline,
    note,
    plural,
    read_options,
)
from lcm_core.errors import InputError

if TYPE_CHECKING:
    from lcm_core.pipeline import PictureOptions, Pipeline
    from lcm_core.pipeline.settings import Settings

_FAR = 1.6  # times a model's own size; 768 x 512 is 1.2 for one of 512
_SMALL_MODEL = 256  # pixels
_MOST_PICTURES = 10_000


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "generate", "Paint pictures.", 'generate "a slice of pizza, noto style" --steps 4 --output pizza.png'
    )
    parser.set_defaults(run=run)
    parser.add_argument("prompt", nargs="?", help="what to paint, in quotes")
    parser.add_argument("--negative", dest="negative_prompt", help="what to avoid (plain models, guidance above 1)")
    parser.add_argument(
        "--steps", dest="num_inference_steps", type=int, metavar="N", help="calls of the network (default 4)"
    )
    parser.add_argument("--seed", type=int, help="first seed (default 0)")
    parser.add_argument("--count", type=int, default=1, help="pictures, with rising seeds (default 1)")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once: quicker on a GPU, other last bits")
    parser.add_argument("--output", type=Path, help="file (.png, .jpg, .webp) or folder (default: named by the prompt)")
    parser.add_argument("--image", metavar="PATH", help="start from this picture")
    parser.add_argument("--mask", metavar="PATH", help="repaint only where this picture is white")
    parser.add_argument("--from", dest="source", type=Path, metavar="PICTURE", help="take all settings from a picture")
    add_settings_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Paint, and write each picture as soon as it is done."""
    from lcm_core.pipeline.image import check_storable

    stored = _stored(args.source) if args.source else None
    options = read_options(args) if stored is None else stored | read_options(args)
    if options.prompt is None:
        raise InputError('no prompt was given; write one in quotes ("" for anything), or use --from PICTURE')
    for name in ("count", "batch"):
        if not 1 <= getattr(args, name) <= _MOST_PICTURES:
            raise InputError(f"--{name} {getattr(args, name)} is out of range; use 1 to {_MOST_PICTURES}")
    seeds = range(options.seed or 0, (options.seed or 0) + args.count)
    paths = _outputs(args, options.prompt, seeds)
    if stored is not None:
        _tell_files(args.source, stored, options)
        _use_threads(options.threads)
    pipe, load_seconds = load_pipeline(options)
    image, mask = options.image, options.mask
    first = pipe.resolve(options, image)
    _warn(pipe, first)
    check_storable(paths[0], pipe.describe(replace(first, seed=seeds[-1]).check(), image, mask).said)
    with Progress(pipe.count_steps(first) * args.count, "painting") as progress:
        pictures = [replace(first, seed=seed) for seed in seeds]
        painted = pipe.paint(pictures, image, mask, args.batch, progress.step)
        _save(pipe, zip(painted, pictures, paths, strict=True), image, mask)
    print(_summary(pipe, first, seeds, paths, load_seconds, progress.seconds))


def _stored(path: Path) -> PictureOptions:
    """The options that a picture of this command carries."""
    from lcm_core.pipeline.image import read_settings
    from lcm_core.pipeline.options import parse_options

    stored = read_settings(path)
    if "prompt" not in stored:
        raise InputError(f"{path} was not made by `generate`; give a picture that was")
    try:
        return parse_options(stored)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _use_threads(count: int | None) -> None:
    """Sums are split among the CPU's threads, so that another number of them rounds to other last bits."""
    import torch

    cores = max(os.cpu_count() or 1, torch.get_num_threads())
    if count is None:
        return
    if count <= cores:
        torch.set_num_threads(count)
    else:
        note(f"the picture was painted with {count} threads, here are {cores}: its last bits may differ")


def _tell_files(source: Path, stored: PictureOptions, options: PictureOptions) -> None:
    """Say which files a picture's settings open: it may come from anybody."""
    names = ("model", "vae", "tokenizer", "image", "mask")
    kept = {name: value for name, value in stored.said.items() if options.said[name] == value}
    asked = [f"{name} {kept[name]!r}" for name in names if name in kept]
    asked += [f"lora {path!r}" for path, _ in kept.get("lora", ())]
    if asked and asked != ["model 'emoji'"]:
        note(f"{source} uses {', '.join(asked)}")


def _outputs(args: argparse.Namespace, prompt: str, seeds: Sequence[int]) -> list[Path]:
    """Where each picture goes; checked now, so that no work is lost later."""
    from lcm_core.files.atomic import check_name
    from lcm_core.pipeline.image import IMAGE_SUFFIXES

    slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60].encode("utf-8", "ignore")[:120].decode("utf-8", "ignore")
    slug = slug or "picture"
    out = args.output
    if out is not None:
        check_name(out)
        if out.name.lower() in IMAGE_SUFFIXES:
            raise InputError(f"--output {out} has no name before {out.name}; write e.g. picture{out.name}")
    if out is None:
        out = args.source.with_name(f"{args.source.stem}-again{args.source.suffix}") if args.source else None
    if out is None or out.is_dir() or not out.suffix:
        paths = [(out or Path()) / f"{slug}-{seed}.png" for seed in seeds]
    elif len(seeds) == 1:
        paths = [out]
    else:
        paths = [out.with_name(f"{out.stem}-{seed}{out.suffix}") for seed in seeds]
    if paths[0].suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(f"--output {args.output}: no kind of picture; use {', '.join(IMAGE_SUFFIXES)} or a folder")
    for path in paths:
        check_output(path)
    return paths


def _save(pipe: Pipeline, painted: Any, image: str | None, mask: str | None) -> None:
    from lcm_core.pipeline.image import save_image

    for picture, settings, path in painted:
        save_image(picture, path, pipe.describe(settings, image, mask).said)


def _warn(pipe: Pipeline, settings: Settings) -> None:
    if pipe.model.guidance_embedding_dim is not None and settings.negative_prompt:
        note("a full LCM has no negative pass; --negative has no effect")
    elif settings.negative_prompt and settings.guidance_scale == 1:
        note("--negative has no effect at guidance 1; raise --guidance")
    own, side = pipe.model.resolution, (settings.width * settings.height) ** 0.5
    if own < _SMALL_MODEL:  # larger ones may well be upscaled: their details are small beside the picture
        side *= settings.upscale
    if not 1 / _FAR <= side / own <= _FAR:
        note(f"{pipe.model.name} was trained at {own}x{own} pixels; at {side:.0f} it may show no more than texture")
    if settings.sampler in ("lcm", "tcd") and not pipe.model.recommended.is_distilled:
        note(
            f"{pipe.model.name} looks like a plain model; few steps need an LCM-LoRA (--lora PATH), "
            "or use --sampler dpmpp_2m --steps 25 --guidance 7.5"
        )


def _summary(
    pipe: Pipeline, settings: Settings, seeds: range, paths: list[Path], load_seconds: float, seconds: float
) -> str:
    many = len(paths) > 1
    where = f"{paths[0]} to {paths[-1].name}" if many else str(paths[0])
    seed = f"seeds {seeds[0]} to {seeds[-1]}" if many else f"seed {settings.seed}"
    return (
        f"{where}: model {pipe.model.title}, {plural(settings.num_inference_steps, 'step')}, guidance "
        f"{settings.guidance_scale:g}, {seed}; loaded in {load_seconds:.1f} s, painted in {seconds:.2f} s"
    )
