"""What Python callers give and get beside words and pictures: seeds, generators, arrays, tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.pipeline.image import to_pil

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Generators = torch.Generator | Sequence[torch.Generator]
_SEEDS = 2**63 - 1


@dataclass(frozen=True, repr=False)
class Result:
    """Pictures, and for each of them the settings that make it again (plain JSON values)."""

    images: Any
    """A list of Pillow pictures, or what `output_type` asked for."""
    settings: list[dict[str, Any]]

    def __repr__(self) -> str:
        seeds = ", ".join(str(said["seed"]) for said in self.settings[:5]) + ", ..." * (len(self.settings) > 5)
        sizes = sorted({f"{said['width']}x{said['height']}" for said in self.settings})
        return f"Result({len(self.settings)} pictures of {' and '.join(sizes) or 'no size'}, seeds {seeds or 'none'})"


def as_output(images: Sequence[Tensor], kind: OutputType) -> Any:
    """Batches (B, 3, H, W) in [-1, 1] as diffusers gives them: Pillow pictures, arrays (B, H, W, 3) or tensors
    (B, 3, H, W), both in [0, 1]; "latent" is left as it is."""
    from einops import rearrange

    if kind == "pil":
        return [picture for batch in images for picture in to_pil(batch)]
    if not images:
        return torch.empty(0) if kind != "np" else torch.empty(0).numpy()
    joined = torch.cat(list(images))
    if kind == "latent":
        return joined
    scaled = (joined.float() / 2 + 0.5).clamp(0, 1)
    return rearrange(scaled, "b c h w -> b h w c").cpu().numpy() if kind == "np" else scaled


def seeds_of(generator: Generators) -> list[int]:
    """A seed from each generator, which moves on: a fresh one gives its own, one that was used the next of its numbers.

    So a fresh generator paints what the same seed paints, in diffusers too, and using it again paints something else.
    """
    found = []
    for one in [generator] if isinstance(generator, torch.Generator) else generator:
        fresh = torch.Generator(one.device).manual_seed(one.initial_seed())
        is_fresh = torch.equal(one.get_state(), fresh.get_state())
        drawn = int(torch.randint(_SEEDS, (1,), generator=one, device=one.device))
        found.append(one.initial_seed() if is_fresh else drawn)
    return found


def pair_up(prompt: str | Sequence[str], seed: int | Sequence[int], per_prompt: int = 1) -> list[tuple[str, int]]:
    """Each picture's prompt and seed: one of either for all of the other, or pairs.

    Args:
        prompt: one, or a list.
        seed: one, or a list; numpy's whole numbers are numbers too.
        per_prompt: pictures of each pair, with rising seeds.

    Raises:
        InputError: they do not pair up, or a seed is no whole number.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if isinstance(seed, str):
        raise InputError(f"seed {seed!r:.40} is no whole number")
    numbers: Any = seed if hasattr(seed, "__len__") else [seed]
    seeds = [whole("seed", number) for number in numbers]
    count = max(len(prompts), len(seeds))
    if not prompts or not seeds or len(prompts) not in (1, count) or len(seeds) not in (1, count):
        raise InputError(
            f"{len(prompts)} prompts and {len(seeds)} seeds do not pair up; give one of either, or as many"
        )
    pairs = zip(prompts * (count // len(prompts)), seeds * (count // len(seeds)), strict=True)
    return [(words, number + more) for words, number in pairs for more in range(per_prompt)]


def whole(name: str, number: Any) -> int:
    """A whole number of any kind that Python counts with, numpy's and tensors of one element included.

    Raises:
        InputError: it is none.
    """
    try:
        return operator.index(number)
    except (TypeError, RuntimeError):
        raise InputError(f"{name} {number!r:.40} is no whole number") from None
