"""`generate`: pictures from a prompt, an input image, or the settings inside an earlier picture."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lcm_core.cli.common import (
    Progress,
    add_command,
    add_model_options,
    add_settings_options,
    check_output,
    load_pipeline,
    note,
    parse_control,
    parse_seeds,
    plural,
    read_options,
)
from lcm_core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcm_core.pipeline import PictureOptions, Pipeline
    from lcm_core.pipeline.settings import Settings

_FAR = 1.6  # times a model's own size; 768 x 512 is 1.2 for one of 512
_SMALL_MODEL = 256  # pixels
_MOST_PICTURES = 10_000


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "generate", "Paint pictures.", 'generate "a panda, noto style" --steps 4 --output panda.png'
    )
    parser.set_defaults(run=run)
    parser.add_argument("prompt", nargs="?", help="what to paint, in quotes")
    parser.add_argument("--second-prompt", help="mix the prompt with this one, by --blend")
    parser.add_argument("--blend", type=float, metavar="SHARE", help="0 is the prompt alone, 1 the second one")
    parser.add_argument(
        "--class", dest="class_name", metavar="NAME", help="of a class-conditional model: what to paint"
    )
    parser.add_argument("--negative", dest="negative_prompt", help="what to avoid (at guidance above 1, or with --nag)")
    parser.add_argument(
        "--steps", dest="num_inference_steps", type=int, metavar="N", help="calls of the network (default 4)"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt on each line")
    parser.add_argument("--wildcards", type=Path, metavar="FOLDER", help="__colour__ is a line of colour.txt in there")
    parser.add_argument("--seed", type=parse_seeds, metavar="N[,N,...]", help="seeds of each prompt (default 0)")
    parser.add_argument("--count", type=int, help="pictures of each prompt, with rising seeds (default 1)")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once: quicker on a GPU, other last bits")
    parser.add_argument("--output", type=Path, help="file (.png, .jpg, .webp) or folder (default: named by the prompt)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also write all pictures as one, with their seeds")
    parser.add_argument("--image", metavar="PATH", help="start from this picture")
    parser.add_argument("--mask", metavar="PATH", help="repaint only where this picture is white")
    parser.add_argument(
        "--control",
        action="append",
        type=parse_control,
        metavar="NETWORK=PICTURE[:STRENGTH]",
        help="let a picture guide, by 'canny' (embedded model: white outlines on black), a T2I-Adapter, ControlNet "
        "or IP-Adapter",
    )
    parser.add_argument("--from", dest="source", type=Path, metavar="PICTURE", help="take all settings from a picture")
    add_settings_options(parser)
    add_model_options(parser)


class _Work(NamedTuple):
    """What a command line asks for, checked as far as that goes without the model."""

    options: PictureOptions
    pairs: list[tuple[str, int]]
    """Each picture's prompt and seed."""
    paths: list[Path]


def run(args: argparse.Namespace) -> None:
    """Paint, and write each picture as soon as it is done."""
    from lcm_core.pipeline.image import check_storable

    work = _read_work(args)
    options = work.options
    pipe, load_seconds = load_pipeline(options)
    control = [(name, picture, strength) for name, picture, strength in options.control or ()]
    first = pipe.resolve(options, options.image)
    pictures = [replace(first, prompt=words, seed=seed).check() for words, seed in work.pairs]
    _warn(pipe, first)
    said = [pipe.describe(one, options.image, options.mask, control).said for one in pictures]
    check_storable(work.paths[0], max(said, key=_prompt_length))
    with Progress(pipe.count_steps(first) * len(pictures), "painting") as progress:
        painted = pipe.paint(pictures, options.image, options.mask, args.batch, progress.step, control)
        _save(zip(painted, said, work.paths, strict=True), args.sheet)
    print(_summary(pipe, first, work, load_seconds, progress.seconds))


def _read_work(args: argparse.Namespace) -> _Work:
    if not 1 <= args.batch <= _MOST_PICTURES:
        raise InputError(f"--batch {args.batch} is out of range; use 1 to {_MOST_PICTURES}")
    if args.class_name is not None and (args.prompt is not None or args.prompts is not None):
        raise InputError("a prompt and --class were both given; use one of them")
    asked = replace(read_options(args), seed=None)  # --seed may name several
    stored = _stored(args.source) if args.source else None
    if stored is not None and args.class_name is not None:
        stored = replace(stored, prompt=None)  # a class takes the place of the picture's own
    options = asked if stored is None else stored | asked
    prompts = _prompts(args, options.prompt)
    seeds = _seeds(args.count, args.seed, options.seed)
    if len(prompts) * len(seeds) > _MOST_PICTURES:
        raise InputError(f"{len(prompts) * len(seeds)} pictures were asked for; use up to {_MOST_PICTURES} at once")
    pairs = [(_filled(words, args.wildcards, seed), seed) for words in prompts for seed in seeds]
    paths = _outputs(args, pairs, len(prompts))
    if stored is not None:
        _tell_files(args.source, stored, options)
        _use_threads(options.threads)
    return _Work(options, pairs, paths)


def _prompts(args: argparse.Namespace, prompt: str | None) -> list[str]:
    """What to paint: each line of a file, the prompt, or the name of a class."""
    from lcm_core.pipeline.wildcards import read_lines

    if args.prompts is not None:
        if args.prompt is not None:
            raise InputError("a prompt and --prompts were both given; use one of them")
        return read_lines(args.prompts)
    chosen = prompt if args.class_name is None else args.class_name
    if chosen is None:
        raise InputError('no prompt was given; write one in quotes ("" for anything), or use --from PICTURE')
    return [chosen]


def _seeds(count: int | None, given: tuple[int, ...] | None, stored: int | None) -> list[int]:
    if count is not None and not 1 <= count <= _MOST_PICTURES:
        raise InputError(f"--count {count} is out of range; use 1 to {_MOST_PICTURES}")
    if given is not None and len(given) > 1:
        if count is not None:
            raise InputError("--count goes with one seed, from which it counts; leave it out, or give one seed")
        if len(set(given)) < len(given):
            raise InputError("--seed names a seed twice; give each once")
        return list(given)
    first = given[0] if given else stored or 0
    return list(range(first, first + (count or 1)))


def _filled(prompt: str, wildcards: Path | None, seed: int) -> str:
    from lcm_core.pipeline.wildcards import fill_wildcards

    return prompt if wildcards is None else fill_wildcards(prompt, wildcards, seed)


def _prompt_length(said: Mapping[str, Any]) -> int:
    return len(said["prompt"])


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
    asked += [f"embedding {path!r}" for path in kept.get("embedding", ())]
    asked += [f"control {name!r} with {picture!r}" for name, picture, _ in kept.get("control", ())]
    if asked and asked != ["model 'emoji'"]:
        note(f"{source} uses {', '.join(asked)}")


def _outputs(args: argparse.Namespace, pairs: Sequence[tuple[str, int]], prompts: int) -> list[Path]:
    """Where each picture goes; checked now, so that no work is lost later."""
    from lcm_core.files.atomic import check_name
    from lcm_core.pipeline.image import IMAGE_SUFFIXES

    out = args.output
    for given in (out, args.sheet):
        if given is not None:
            check_name(given)
            if given.name.lower() in IMAGE_SUFFIXES:
                raise InputError(f"{given} has no name before {given.name}; write e.g. picture{given.name}")
    if out is None:
        out = args.source.with_name(f"{args.source.stem}-again{args.source.suffix}") if args.source else None
    numbers = [str(seed) for _, seed in pairs]
    if prompts > 1:  # lines of a file may begin alike
        each = len(pairs) // prompts
        numbers = [f"{place // each + 1}-{seed}" for place, seed in enumerate(numbers)]
    if out is None or out.is_dir() or not out.suffix:
        paths = [
            (out or Path()) / f"{_slug(words)}-{number}.png" for (words, _), number in zip(pairs, numbers, strict=True)
        ]
    elif len(pairs) == 1:
        paths = [out]
    else:
        paths = [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in numbers]
    for option, path in (("--output", paths[0]), ("--sheet", args.sheet)):
        if path is not None and path.suffix.lower() not in IMAGE_SUFFIXES:
            raise InputError(f"{option} {path}: no kind of picture; use {', '.join(IMAGE_SUFFIXES)} or a folder")
    for path in [*paths, *([args.sheet] if args.sheet else [])]:
        check_output(path)
    return paths


def _slug(prompt: str) -> str:
    """A prompt as the name of a file."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60].encode("utf-8", "ignore")[:120]
    return words.decode("utf-8", "ignore") or "picture"


def _save(painted: Iterable[tuple[Image, dict[str, Any], Path]], sheet: Path | None) -> None:
    from lcm_core.pipeline.image import save_image
    from lcm_core.pipeline.sheets import contact_sheet

    kept, labels = [], []
    for picture, settings, path in painted:
        save_image(picture, path, settings)
        if sheet is not None:
            kept.append(picture)
            labels.append(f"{settings['seed']}: {settings['prompt']}")
    if sheet is not None:
        save_image(contact_sheet(kept, labels), sheet)


def _warn(pipe: Pipeline, settings: Settings) -> None:
    has_negative = settings.negative_prompt and settings.nag_scale == 1
    if pipe.model.guidance_embedding_dim is not None and has_negative:
        note("a full LCM has no negative pass; --negative has no effect without --nag")
    elif has_negative and settings.guidance_scale == 1:
        note("--negative has no effect at guidance 1; add --nag 3, or raise --guidance")
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


def _summary(pipe: Pipeline, settings: Settings, work: _Work, load_seconds: float, seconds: float) -> str:
    paths, seeds = work.paths, list(dict.fromkeys(seed for _, seed in work.pairs))
    where = f"{paths[0]} to {paths[-1].name}" if len(paths) > 1 else str(paths[0])
    seed = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    return (
        f"{where}: model {pipe.model.title}, {plural(settings.num_inference_steps, 'step')}, guidance "
        f"{settings.guidance_scale:g}, {seed}; loaded in {load_seconds:.1f} s, painted in {seconds:.2f} s"
    )
