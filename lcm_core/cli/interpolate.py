"""`interpolate`: an animation that travels between prompts and seeds."""

from __future__ import annotations

import argparse
import re
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
    plural,
    read_options,
)
from lcm_core.errors import InputError

if TYPE_CHECKING:
    from lcm_core.pipeline import Keyframe


def add_to(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "interpolate",
        "Paint an animation that travels between prompts and seeds.",
        'interpolate --from "a red apple, noto style" --to "a green pear, noto style" --loop --output fruit.gif',
    )
    parser.set_defaults(run=run)
    parser.add_argument("--from", dest="start", metavar="PROMPT", help="prompt of the first frame")
    parser.add_argument("--to", metavar="PROMPT", help="prompt of the last frame (default: that of --from)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first frame (default 0)")
    parser.add_argument("--to-seed", type=int, help="seed of the last frame (default: that of --seed)")
    parser.add_argument("--image", metavar="PATH", help="input picture of the first frame")
    parser.add_argument("--to-image", metavar="PATH", help="input picture of the last frame (default: that of --image)")
    parser.add_argument(
        "--keyframe",
        action="append",
        metavar="PROMPT[@SEED]",
        help="instead of --from and --to, two or more of these; without @SEED, --seed is used",
    )
    parser.add_argument("--negative", dest="negative_prompt", help="what to avoid (plain models, guidance above 1)")
    parser.add_argument(
        "--steps", dest="num_inference_steps", type=int, metavar="N", help="calls of the network per frame (default 4)"
    )
    parser.add_argument("--frames", type=int, default=24, help="how many (default 24)")
    parser.add_argument("--fps", type=float, default=12, help="frames a second (default 12)")
    parser.add_argument("--loop", action="store_true", help="travel back to the first frame, without a seam")
    parser.add_argument("--ease", default="linear", help="linear, smooth, sine, cubic, in or out (default linear)")
    parser.add_argument("--mode", default="slerp", help="slerp (default) or lerp")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("travel.gif"),
        help=".gif, .webp, .mp4, or a new folder for the frames (default travel.gif)",
    )
    add_settings_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Paint all frames, then write them in one go."""
    from lcm_core.diffusion.interpolation import ease, plan_frames
    from lcm_core.pipeline.animation import check_animation, save_animation

    check_animation(args.output, args.fps)
    check_output(args.output, folder=not args.output.suffix)
    options = replace(read_options(args), seed=None, image=None)  # each keyframe's own
    plan_frames(2, args.frames)  # refuses what cannot be before the model is loaded
    ease(0, args.ease)
    keyframes = _keyframes(args)
    pipe, load_seconds = load_pipeline(options)
    steps = pipe.count_steps(pipe.resolve(options, keyframes[0].image))
    with Progress(steps * args.frames, "painting") as progress:
        travel = pipe.interpolate(keyframes, args.frames, args.mode, args.ease, args.loop, progress.step, options)
        frames = list(travel)
    save_animation(frames, args.output, args.fps)
    print(
        f"{args.output}: {plural(len(frames), 'frame')}, model {pipe.model.title}, {plural(steps, 'step')} each; "
        f"loaded in {load_seconds:.1f} s, painted in {progress.seconds:.2f} s"
    )


def _keyframes(args: argparse.Namespace) -> list[Keyframe]:
    from lcm_core.pipeline import Keyframe

    if args.keyframe:
        if args.start is not None or args.to is not None or args.to_seed is not None:
            raise InputError("--keyframe was given beside --from, --to or --to-seed; use one way or the other")
        if len(args.keyframe) < 2:
            raise InputError("one --keyframe makes no animation; give two or more")
        return [_keyframe(text, args.seed, args.image) for text in args.keyframe]
    if args.start is None:
        raise InputError("no prompt was given; use --from PROMPT --to PROMPT, or --keyframe twice or more")
    prompt, seed, image = args.to, args.to_seed, args.to_image
    if prompt is None and seed is None and image is None:
        raise InputError("the animation has no end; add --to PROMPT, --to-seed N or --to-image PATH")
    return [
        Keyframe(args.start, args.seed, args.image),
        Keyframe(
            args.start if prompt is None else prompt,
            args.seed if seed is None else seed,
            args.image if image is None else image,
        ),
    ]


def _keyframe(text: str, seed: int, image: str | None) -> Keyframe:
    from lcm_core.pipeline import Keyframe

    match = re.fullmatch(r"(.*)@(-?\d+)", text, re.DOTALL)
    return Keyframe(match[1], int(match[2]), image) if match else Keyframe(text, seed, image)
