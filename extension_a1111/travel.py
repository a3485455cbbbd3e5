"""LCM latent travel, without the web UI: the points, and what lies between two of them.

A frame between two points is one ordinary picture whose prompt embedding, first noise and all later noise are mixed by
the same fraction; on a point the fraction is 0 and nothing is mixed, so the frame is the picture of that point.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from extension_a1111.translation import Mistake
from lcm_core.diffusion.interpolation import interpolate

Schedule = list[tuple[int, Any]]
"""A prompt over the steps of a picture: (last step, conditioning), in order; a conditioning is (L, D) or a dict."""

Part = tuple[Schedule, float]
"""One part of a prompt that is joined by AND, and its weight."""
MAX_SEED = 2**63 - 1
"""The largest number that every source of noise takes."""

_SEED_AT_END = re.compile(r"(.*)@\s*(-?\d+)\s*", re.DOTALL)
_NETWORK = re.compile(r"<\w+:[^<>]+>")


class Point(NamedTuple):
    """A picture that the animation passes through."""

    prompt: str
    seed: int


def read_points(text: str, prompt: str, seed: int, start_above: bool = True) -> list[Point]:
    """The points of an animation, from one line of text each: `PROMPT`, `PROMPT @ SEED` or `@ SEED`.

    Args:
        text: the lines; empty ones are left out.
        prompt, seed: of the main page: what a line leaves out, and the first point if `start_above`. Extra networks in
            `prompt`, such as `<lora:name:1>`, are in force for the whole animation.
        start_above: whether the main page is the first point.

    Raises:
        InputError: fewer than two points, a seed that is too large, or a line with an extra network, which could not
            change from frame to frame.
    """
    networks = "".join(f" {network}" for network in _NETWORK.findall(prompt))
    points = [Point(prompt, seed)] if start_above else []
    for line in filter(None, map(str.strip, text.splitlines())):
        if found := _NETWORK.search(line):
            words = "the point '{point}' has {network}; write it in the main prompt, for the whole travel"
            raise Mistake(words, point=line, network=found[0])
        match = _SEED_AT_END.fullmatch(line)
        words, number = (match[1].strip(), _read_seed(match[2], line)) if match else (line, seed)
        points.append(Point(words + networks if words else prompt, number))
    if len(points) < 2:
        raise Mistake("travel needs two points; write one on each line: a prompt, @ seed, or a prompt @ seed")
    return points


def _read_seed(digits: str, line: str) -> int:
    with suppress(ValueError):  # Python reads no more than 4300 digits
        if abs(number := int(digits)) <= MAX_SEED:
            return number
    words = "the point '{point}' has a seed that is too large; use at most {largest}"
    raise Mistake(words, point=line[:200], largest=MAX_SEED)


class TravelNoise:
    """The web UI's source of noise for a frame: each draw, the first and all later ones, is mixed from two sources."""

    def __init__(self, start: Any, end: Any, fraction: float, mode: str) -> None:
        self.start, self.end, self.fraction, self.mode = start, end, fraction, mode

    def __getattr__(self, name: str) -> Any:
        return getattr(self.start, name)  # for scripts that look into the host's class

    def next(self) -> Any:
        """The next noise (B, C, h, w)."""
        return interpolate(self.start.next(), self.end.next(), self.fraction, self.mode)


def travelling(
    source: Callable[..., Any], seeds: Sequence[int], fraction: float, mode: str
) -> Callable[..., TravelNoise]:
    """Stands in for the web UI's class of noise sources, to make each one anew with `seeds` and mix it in.

    It stands in for the class, since the second pass of hires fix makes a source of its own.
    """

    def make(shape: Any, own_seeds: Any, *args: Any, **options: Any) -> TravelNoise:
        return TravelNoise(
            source(shape, own_seeds, *args, **options), source(shape, seeds, *args, **options), fraction, mode
        )

    return make


def mix_conditioning(a: Any, b: Any, fraction: float, mode: str) -> Any:
    """Embeddings of two prompts, `fraction` of the way from `a` to `b`: tensors (L, D), or dicts of them and vectors.

    The web UI makes prompts of unequal length equal by repeating the last row of the shorter one; so does this.
    """
    if isinstance(a, dict):
        return type(a)({name: mix_conditioning(a[name], b[name], fraction, mode) for name in a})
    if a.ndim > 1:
        length = max(len(a), len(b))
        a, b = (x if len(x) == length else _lengthened(x, length) for x in (a, b))
    return interpolate(a[None], b[None], fraction, mode)[0]


def mix_schedules(a: Schedule, b: Schedule, fraction: float, mode: str) -> Schedule:
    """Two prompts over the steps, mixed: a new stretch begins wherever one of them changes."""
    ends = sorted({end for end, _ in a} | {end for end, _ in b})
    return [(end, mix_conditioning(_at(a, end), _at(b, end), fraction, mode)) for end in ends]


def mix_parts(a: Sequence[Part], b: Sequence[Part], fraction: float, mode: str) -> list[Part]:
    """Two prompts of several parts, mixed part by part; one that the other prompt lacks fades by its weight.

    The parts' guidance is summed with their weights, so that weight 0 is no part.
    """
    mixed = [
        (mix_schedules(one, other, fraction, mode), weight + (other_weight - weight) * fraction)
        for (one, weight), (other, other_weight) in zip(a, b, strict=False)
    ]
    leaving = [(schedule, weight * (1 - fraction)) for schedule, weight in a[len(b) :]]
    coming = [(schedule, weight * fraction) for schedule, weight in b[len(a) :]]
    return [*mixed, *leaving, *coming]


def describe(end: Point, fraction: float) -> str:
    """What an infotext says of a frame that lies between its own prompt and seed and the point `end`."""
    return f"{fraction:.4g} of the way to {_NETWORK.sub('', end.prompt).strip()} @ {end.seed}"


def _at(schedule: Schedule, step: int) -> Any:
    return next((conditioning for end, conditioning in schedule if step <= end), schedule[-1][1])


def _lengthened(x: Any, length: int) -> Any:
    return torch.cat([x, x[-1:].expand(length - len(x), *x.shape[1:])])
