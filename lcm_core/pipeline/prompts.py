"""What the network is given in each step of a batch: prompts that change on the way, and prompts that AND joins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcm_core.diffusion.guidance import Model as Denoise
from lcm_core.diffusion.interpolation import interpolate
from lcm_core.errors import InputError
from lcm_core.networks.conditioning import flatten, nest, repeat_alike
from lcm_core.networks.prompt import split_parts, texts_at_steps
from lcm_core.pipeline.model import Conditioning, Model


@dataclass(frozen=True, eq=False)
class Step:
    """One step's conditionings, of which each picture has a weighted sum."""

    parts: tuple[Conditioning, ...]
    weights: tuple[Tensor, ...]
    """(B,) for each of them."""


StepSource = Callable[[int, "int | None"], list[Step]]
"""A function from a pass's steps, and those of the pass before it, to what each of them is given; see
`texts_at_steps`."""


def encode_prompts(
    model: Model, prompts: Sequence[str], size: tuple[int, int], syntax: str, joined: bool = True
) -> StepSource:
    """Encode a batch of prompts.

    Args:
        model: whose text encoder it is.
        prompts: one for each picture.
        size: (width, height) of the pictures.
        syntax: one of `settings.PROMPT_SYNTAXES`.
        joined: whether AND joins prompts; in a negative one it is a word.
    """
    is_plain = syntax == "plain"
    rows = [[(prompt, 1.0)] if is_plain or not joined else split_parts(prompt) for prompt in prompts]
    count = max(map(len, rows))
    rows = [row + [(row[0][0], 0.0)] * (count - len(row)) for row in rows]
    weights = tuple(torch.tensor([row[part][1] for row in rows], device=model.device) for part in range(count))
    made: dict[tuple[tuple[str, ...], ...], Step] = {}

    def encoded(texts: tuple[tuple[str, ...], ...]) -> Step:
        if texts not in made:
            made[texts] = Step(tuple(model.encode(part, *size, weighted=not is_plain) for part in texts), weights)
        return made[texts]

    def source(steps: int, earlier: int | None) -> list[Step]:
        def at_steps(prompt: str) -> list[str]:
            return [prompt] * steps if is_plain else texts_at_steps(prompt, steps, earlier)

        texts = [[at_steps(row[part][0]) for row in rows] for part in range(count)]
        return [encoded(tuple(tuple(row[step] for row in part) for part in texts)) for step in range(steps)]

    return source


def steps_of(cond: StepSource | Conditioning) -> StepSource:
    """Conditioning for all steps; a source is returned as it is."""
    if callable(cond):
        return cond
    step = Step((cond,), (torch.ones(1),))
    return lambda steps, earlier: [step] * steps


def mix_sources(a: StepSource, b: StepSource, fraction: float, mode: str) -> StepSource:
    """What is `fraction` of the way from `a` to `b`, step by step; 0 and 1 give them as they are."""
    if fraction in (0, 1):
        return b if fraction else a

    def source(steps: int, earlier: int | None) -> list[Step]:
        pairs = list(zip(a(steps, earlier), b(steps, earlier), strict=True))
        made = {pair: _mix(*pair, fraction, mode) for pair in dict.fromkeys(pairs)}
        return [made[pair] for pair in pairs]

    return source


def _mix(a: Step, b: Step, fraction: float, mode: str) -> Step:
    if len(a.parts) != len(b.parts):
        raise InputError(
            f"one prompt joins {len(a.parts)} by AND, the next one {len(b.parts)}; between them, give both as many"
        )
    parts = []
    for pair in zip(a.parts, b.parts, strict=True):
        first, second = map(flatten, repeat_alike(*pair))
        parts.append(nest({name: _between(name, first[name], second[name], fraction, mode) for name in first}))
    weights = tuple(torch.lerp(*pair, fraction) for pair in zip(a.weights, b.weights, strict=True))
    return Step(tuple(parts), weights)


def _between(name: str, a: Tensor, b: Tensor, fraction: float, mode: str) -> Tensor:
    if name != "class_labels":
        return interpolate(a, b, fraction, mode)
    if not torch.equal(a, b):
        raise InputError("there is nothing between two classes; give all keyframes the same one, with other seeds")
    return a


def guided_by_steps(
    model: Model,
    denoiser: Denoise,
    steps: Sequence[Step],
    negative: Sequence[Step] | None,
    scale: float,
    sigmas: Tensor,
) -> Denoise:
    """A denoiser that is given in each step what belongs to it.

    Args:
        model, denoiser, scale: see `Model.guided`.
        steps, negative: one for each step.
        sigmas: (N + 1,) noise levels, falling, by which a step is known.
    """
    absent: list[Step | None] = [None] * len(steps)
    pairs = list(zip(steps, negative or absent, strict=True))
    made = {pair: _guided(model, denoiser, *pair, scale) for pair in dict.fromkeys(pairs)}
    if len(made) == 1:
        return made[pairs[0]]
    levels = sigmas[:-1].double()

    def guided(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        reached = int((levels >= sigma.double().max() * (1 - 1e-6)).sum())
        return made[pairs[max(reached, 1) - 1]](x, sigma, **extra_args)

    return guided


def _guided(model: Model, denoiser: Denoise, step: Step, negative: Step | None, scale: float) -> Denoise:
    """x0 = x0_n + scale * sum_i w_i (x0_i - x0_n) of prompts joined by AND (arXiv 2206.01714 Eq. 11).

    A network that reads its guidance as an input has no negative pass; its x0 is the mean by the weights w.
    """
    uncond = None if negative is None else negative.parts[0]
    if len(step.parts) == 1:
        return model.guided(denoiser, step.parts[0], uncond, scale)
    parts = [model.guided(denoiser, part, None, scale) for part in step.parts]
    base = None if uncond is None or model.reads_guidance else model.guided(denoiser, uncond, None, 1.0)
    total = torch.stack(step.weights).sum(0)
    if base is None and not bool((total > 0).all()):
        raise InputError("the weights of prompts that AND joins add up to nothing, and this model has no negative pass")

    def guided(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        found = [part(x, sigma, **extra_args) for part in parts]
        shape = (-1, *[1] * (x.ndim - 1))
        weighted = zip(found, step.weights, strict=True)
        if base is None:
            return sum(x0 * (weight / total).view(shape) for x0, weight in weighted)  # type: ignore[return-value]
        x0_n = base(x, sigma, **extra_args)
        return x0_n + sum((x0 - x0_n) * (weight * scale).view(shape) for x0, weight in weighted)

    return guided
