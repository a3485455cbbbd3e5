"""What several commands share: model options, outputs that are checked before the work, the progress bar."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.errors import InputError

if TYPE_CHECKING:
    from lcm_core.pipeline import PictureOptions, Pipeline

_LONGEST_LINE = 1000
"""Letters of a message; a prompt or a name that it repeats may be longer than anybody reads."""


def add_command(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A subcommand whose --help ends in an example."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example: python -m lcm_core {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which model runs, and where. Each is None when not given."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="'emoji' (default), a diffusers folder, or a .safetensors file")
    group.add_argument("--unet", choices=("lcm", "teacher"), help="which network of the embedded model (default lcm)")
    group.add_argument(
        "--lora", action="append", type=parse_lora, metavar="PATH[:STRENGTH]", help="LoRA to add; may be repeated"
    )
    group.add_argument(
        "--embedding", action="append", metavar="PATH", help="textual inversion, named in the prompt; may be repeated"
    )
    group.add_argument(
        "--vae", metavar="PATH", help="another VAE, e.g. a tiny one for speed; 'tiny' is the embedded model's"
    )
    group.add_argument("--tokenizer", metavar="FOLDER", help="CLIP's, for a single file that has none beside it")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best one here)")
    group.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the fastest one here)")
    group.add_argument("--vae-dtype", metavar="DTYPE", help="the VAE's (default: that of --dtype)")


def add_settings_options(parser: argparse.ArgumentParser) -> None:
    """Options of `Settings` that every painting command has. Each is None when not given: the model decides."""
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--guidance",
        dest="guidance_scale",
        type=float,
        metavar="SCALE",
        help="how strictly to follow the prompt; 1 is off (default: the model's)",
    )
    group.add_argument(
        "--nag",
        dest="nag_scale",
        type=float,
        metavar="SCALE",
        help="avoid --negative without a second pass, so at guidance 1 and by full LCMs; 1 is off (default), try 3",
    )
    group.add_argument("--nag-tau", type=float, metavar="TIMES", help="how much attention may grow by it (default 2.5)")
    group.add_argument("--nag-alpha", type=float, metavar="SHARE", help="share of --nag (default 0.5)")
    group.add_argument(
        "--prompt-syntax",
        choices=("a1111", "plain"),
        help="a1111 (default) reads (word:1.3) and the like, plain does not",
    )
    group.add_argument("--size", type=parse_size, metavar="WxH", help="picture size in pixels (default: the model's)")
    group.add_argument("--sampler", help="lcm, tcd, euler, dpmpp_2m or dpm_2m (default: the model's)")
    group.add_argument("--original-steps", type=int, metavar="N", help="timesteps of the distillation (default 50)")
    group.add_argument("--timesteps", type=parse_timesteps, metavar="T,T,...", help="your own, falling, e.g. 999,749")
    group.add_argument("--gamma", type=float, help="tcd only: share of fresh noise per step (default 0.3)")
    group.add_argument("--shift", type=float, help="flow models only: of their noise levels (default: the model's)")
    group.add_argument("--strength", type=float, help="with an input image: how much to change, 0 to 1 (default 0.6)")
    group.add_argument("--upscale", type=float, metavar="FACTOR", help="second pass at FACTOR times the size")
    group.add_argument("--upscale-strength", type=float, metavar="S", help="strength of the second pass (default 0.5)")


def read_options(args: argparse.Namespace) -> PictureOptions:
    """What a command line asks for."""
    from lcm_core.pipeline.options import PictureOptions

    given = {field.name: getattr(args, field.name, None) for field in fields(PictureOptions)}
    given["width"], given["height"] = getattr(args, "size", None) or (None, None)
    return PictureOptions(**given)


def parse_lora(text: str) -> tuple[str, float]:
    """`PATH[:STRENGTH]`; a colon that no number follows belongs to the path."""
    match = re.fullmatch(r"(.+):([-+]?\d*\.?\d+)", text)
    return (match[1], float(match[2])) if match else (text, 1.0)


def parse_control(text: str) -> tuple[str, str, float]:
    """`canny=picture.png:0.8`."""
    name, found, rest = text.partition("=")
    picture, strength = parse_lora(rest)
    if not (found and name and picture):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no control; write e.g. canny=outlines.png:0.8")
    return name, picture, strength


def parse_seeds(text: str) -> tuple[int, ...]:
    """`7` or `1,2,3`."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no list of seeds; write e.g. 7, or 1,2,3") from None


def parse_size(text: str) -> tuple[int, int]:
    """`512` or `512x768` to (width, height)."""
    match = re.fullmatch(r"(-?\d+)(?:[xX](-?\d+))?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT, e.g. 512x768")
    return int(match[1]), int(match[2] or match[1])


def parse_timesteps(text: str) -> tuple[int, ...]:
    """`999,749,499` to its numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of timesteps; write e.g. 999,749,499,249") from None


def load_pipeline(options: PictureOptions) -> tuple[Pipeline, float]:
    """The pipeline of the model that is asked for, and the seconds that it took to load."""
    start = time.perf_counter()
    from lcm_core.pipeline import Pipeline

    return Pipeline.open(options), time.perf_counter() - start


def check_output(path: Path, folder: bool = False) -> None:
    """Refuse an output file (or new folder) that could not be written, before hours of work go into it.

    Raises:
        InputError: `path` is a folder (or, for a folder, exists at all), or write-protected; or its own folder
            cannot be made or written.
    """
    from lcm_core.files.atomic import check_name

    check_name(path)
    try:
        if folder and path.exists():
            raise InputError(f"cannot write {path}: it exists already; choose a new folder")
        if not folder and path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; give a file name")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"cannot write {path}: it is write-protected; choose another output path")
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another output path") from error


class Progress:
    """A bar on stderr that counts steps; use as a context, and hand `step` to the pipeline as callback."""

    def __init__(self, total: int, label: str) -> None:
        self._total = total
        self._label = label

    def __enter__(self) -> Progress:
        from tqdm import tqdm

        self._bar = tqdm(total=self._total, desc=self._label, unit="step", file=sys.stderr)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._bar.close()

    def step(self, info: dict[str, Any]) -> None:
        """One step of the sampler, made for `info["pictures"]` pictures."""
        self._bar.update(info["pictures"])


def note(message: str) -> None:
    """Something that the user should know but that stops nothing; on a line of its own, even above a moving bar."""
    from tqdm import tqdm

    tqdm.write(one_line(f"note: {message}"), file=sys.stderr)


def one_line(message: str) -> str:
    """A message on a line of its own, without its middle where it repeats a text that is too long to be read."""
    line = " ".join(message.split())
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"


def plural(count: int, thing: str) -> str:
    """`1 step`, `4 steps`."""
    return f"{count} {thing}{'s' * (count != 1)}"
