"""Emoji drawings with captions: what a drawing is, which are held out, and what is shipped of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcm_core.files.atomic import atomic_write
from lcm_core.files.safetensors import read_safetensors, write_safetensors
from lcm_core.pipeline.sources import MODELS

CORE = ("noto", "fluent", "twemoji")
"""The benchmark's styles; of some emoji one of them is held out."""
REDRAWN = {"blob": "noto", "gradient": "fluent"}
"""Styles that show nearly the drawings of another, so that what is held out of the one must be of the other."""
STYLE_HELD_OUT = "ink"
"""Never trained on, so that a style LoRA has something to learn."""
GROUPS = {0: "smileys", 1: "people", 3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects"}
"""Unicode's emoji groups that are used. Left out: symbols, flags and components, which are signs, not drawings."""
TONES = frozenset(("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"))
"""Unicode's five tones of skin, as parts of a code."""
HELD_OUT_SHARE = 0.15
"""Share of the emoji of which one style's drawing is never trained on (so a third of this of all the drawings)."""

SHIPPED = MODELS / "emoji" / "benchmark"
"""The drawings' latents, features and names, beside the embedded model."""

LATENT_STEPS = 24
"""The steps of the shipped latents in each unit of their spread: they reach to 5.3, and are rounded by 1 % of the
spread."""
TEMPLATES = ("{}", "{}", "a {}", "a {} emoji", "an emoji of a {}", "a drawing of a {}", "{} emoji", "the {}")
STYLE_TEMPLATES = ("{}, {} style", "{1} style {0}", "{} in {} style", "{} in the style of {}", "{}")
"""How the style is named, and that it is not."""
STYLE_ALONE_SHARE = 0.04
"""Share of the captions that name the style alone, which shows what the drawings of a style have in common."""


@dataclass(frozen=True)
class Drawing:
    """One picture: emoji `code` (Unicode, hex) called `label`, drawn in `style`."""

    code: str
    label: str
    tags: tuple[str, ...]
    group: str
    style: str
    held_out: bool

    def caption(self, generator: torch.Generator) -> str:
        """A caption in varied words: a template, sometimes with keywords, mostly with the style."""
        dice, template, tag, manner = torch.rand(4, generator=generator).tolist()
        if manner < STYLE_ALONE_SHARE:
            return f"{self.style} style"
        text = TEMPLATES[int(template * len(TEMPLATES))].format(self.label)
        if self.tags and dice < 0.4:
            word = self.tags[int(tag * len(self.tags))]
            text = f"{text}, {word}" if dice < 0.3 else f"a {word} of {self.label}"
        # the first one, which the benchmark asks with, most often
        return STYLE_TEMPLATES[max(0, int(16 * manner) - 16 + len(STYLE_TEMPLATES))].format(text, self.style)

    @property
    def is_toned(self) -> bool:
        """Whether it is one of five tones of skin."""
        return not TONES.isdisjoint(self.code.split("-"))

    @property
    def is_core(self) -> bool:
        """Whether the benchmark asks for it."""
        return self.style in CORE and not self.is_toned

    @property
    def plain_caption(self) -> str:
        return f"{self.label}, {self.style} style"


@dataclass(frozen=True)
class Drawings:
    """All drawings. `images`: (N, 4, S, S) uint8, colours multiplied by opacity, and opacity; `entries[i]` describes
    `images[i]`."""

    images: Tensor
    entries: list[Drawing]

    def on_white(self, chosen: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) uint8 of the drawings numbered `chosen` (B,)."""
        images = self.images[chosen]
        return images[:, :3] + (255 - images[:, 3:])

    def indices(self, held_out: bool) -> Tensor:
        return torch.tensor([i for i, e in enumerate(self.entries) if e.held_out == held_out])


def number_emoji(entries: list[Drawing]) -> Tensor:
    """(N,) the number of each picture's emoji, the same in every style."""
    numbers = {code: i for i, code in enumerate(dict.fromkeys(e.code for e in entries))}
    return torch.tensor([numbers[e.code] for e in entries])


def read_entries(path: Path) -> list[Drawing]:
    return [
        Drawing(**{**entry, "tags": tuple(entry["tags"])}) for entry in json.loads(path.read_text(encoding="utf-8"))
    ]


def write_entries(path: Path, entries: list[Drawing]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps([asdict(e) for e in entries], separators=(",", ":"), ensure_ascii=False), encoding="utf-8"
        )


def save_shipped(folder: Path, entries: list[Drawing], latents: Tensor, features: dict[str, Tensor]) -> None:
    """Keep what is needed of the drawings where the icons are not at hand, rounded.

    Args:
        latents: (M, 4, h, w) of the drawings that are not held out, in their order, scaled as the U-Net wants.
        features: (N, D) of all drawings, from the benchmark's feature networks, by the names to keep them under.
    """
    rounded = (latents.float() * LATENT_STEPS).round().clamp(-127, 127).to(torch.int8)
    halves = {name: tensor.half() for name, tensor in features.items()}
    write_safetensors(folder / "drawings.safetensors", {"latents": rounded, **halves}, {})
    write_entries(folder / "drawings.json", entries)


def load_shipped(folder: Path = SHIPPED) -> tuple[Tensor, list[str]]:
    """Latents (M, 4, h, w) float32 of the drawings that may be trained on, scaled, and their captions."""
    captions = [entry.plain_caption for entry in load_entries(folder)]
    latents = read_safetensors(folder / "drawings.safetensors")[0]["latents"]
    return latents.float() / (LATENT_STEPS if latents.dtype == torch.int8 else 1), captions


def load_entries(folder: Path = SHIPPED) -> list[Drawing]:
    """What the drawings of `load_shipped` show, in their order."""
    return [entry for entry in read_entries(folder / "drawings.json") if not entry.held_out]


def is_held_out(code: str, style: str) -> bool:
    """Whether this emoji in this style is kept for testing. At most one of the core styles of an emoji is."""
    plain = "-".join(part for part in code.split("-") if part not in TONES)
    digest = hashlib.sha256(plain.encode()).digest()
    kept = digest[0] < 256 * HELD_OUT_SHARE and CORE[digest[1] % len(CORE)] == REDRAWN.get(style, style)
    return kept or style == STYLE_HELD_OUT
