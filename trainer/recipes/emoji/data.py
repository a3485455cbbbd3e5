"""Emoji drawings with captions, rendered from the icon sets' vector packages."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
from lcm_core.files.safetensors import read_safetensors, write_safetensors
from lcm_core.pipeline.sources import MODELS

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
"""Style word -> the npm package that draws it."""
NAMES_PACKAGE = "emojibase-data@17.0.0"
GROUPS = {0: "smileys", 1: "people", 3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects"}
"""Unicode's emoji groups that are used. Left out: symbols, flags and components, which are signs, not drawings."""
HELD_OUT_SHARE = 0.15
"""Share of the emoji of which one style's drawing is never trained on (so a third of this of all the drawings)."""

SHIPPED = MODELS / "emoji" / "benchmark"
"""The drawings' latents, features and names, beside the embedded model."""

TEMPLATES = ("{}", "{}", "a {}", "a {} emoji", "an emoji of a {}", "a drawing of a {}", "{} emoji", "the {}")


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
        dice, template, tag = torch.rand(3, generator=generator).tolist()
        text = TEMPLATES[int(template * len(TEMPLATES))].format(self.label)
        if self.tags and dice < 0.4:
            word = self.tags[int(tag * len(self.tags))]
            text = f"{text}, {word}" if dice < 0.3 else f"a {word} of {self.label}"
        return text if 0.15 < template < 0.2 else f"{text}, {self.style} style"

    @property
    def plain_caption(self) -> str:
        return f"{self.label}, {self.style} style"


@dataclass(frozen=True)
class Drawings:
    """All drawings. `images`: (N, 3, S, S) uint8, on white; `entries[i]` describes `images[i]`."""

    images: Tensor
    entries: list[Drawing]

    def indices(self, held_out: bool) -> Tensor:
        return torch.tensor([i for i, e in enumerate(self.entries) if e.held_out == held_out])


def number_emoji(entries: list[Drawing]) -> Tensor:
    """(N,) the number of each picture's emoji, the same in every style."""
    numbers = {code: i for i, code in enumerate(dict.fromkeys(e.code for e in entries))}
    return torch.tensor([numbers[e.code] for e in entries])


def read_entries(path: Path) -> list[Drawing]:
    return [Drawing(**{**entry, "tags": tuple(entry["tags"])}) for entry in json.loads(path.read_text())]


def write_entries(path: Path, entries: list[Drawing]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps([asdict(e) for e in entries], separators=(",", ":"), ensure_ascii=False))


def load_drawings(folder: Path, size: int, icons: Path | None = None) -> Drawings:
    """The drawings at `size` pixels, rendered on the first call and read from `folder` afterwards.

    Args:
        folder: where the rendered pictures are kept.
        size: width and height in pixels.
        icons: a folder with the npm packages (`node_modules`); fetched with npm into `folder` where not given.
    """
    pictures, words = folder / f"drawings-{size}.safetensors", folder / f"drawings-{size}.json"
    if not (pictures.exists() and words.exists()):
        modules = icons or fetch_packages(folder)
        entries, svgs = list_drawings(modules)
        images = torch.stack([render(svg, size) for svg in svgs])
        write_entries(words, entries)
        write_safetensors(pictures, {"images": images}, {})
    return Drawings(read_safetensors(pictures)[0]["images"], read_entries(words))


def save_shipped(folder: Path, entries: list[Drawing], latents: Tensor, features: Tensor) -> None:
    """Keep what is needed of the drawings where the icons are not at hand, in half precision.

    Args:
        latents: (M, 4, h, w) of the drawings that are not held out, in their order, scaled as the U-Net wants.
        features: (N, D) of all drawings, from the benchmark's feature network.
    """
    write_safetensors(folder / "drawings.safetensors", {"latents": latents.half(), "features": features.half()}, {})
    write_entries(folder / "drawings.json", entries)


def load_shipped(folder: Path = SHIPPED) -> tuple[Tensor, list[str]]:
    """Latents (M, 4, h, w) float32 of the drawings that may be trained on, scaled, and their captions."""
    captions = [e.plain_caption for e in read_entries(folder / "drawings.json") if not e.held_out]
    return read_safetensors(folder / "drawings.safetensors")[0]["latents"].float(), captions


def fetch_packages(folder: Path) -> Path:
    """Install the icon packages with npm into `folder`. Returns its `node_modules`.

    Raises:
        InputError: npm is missing or could not fetch the packages.
    """
    modules = folder / "node_modules"
    packages = [*PACKAGES.values(), NAMES_PACKAGE]
    if all((modules / p.rsplit("@", 1)[0] / "package.json").exists() for p in packages):
        return modules
    if shutil.which("npm") is None:
        raise InputError("npm was not found, which fetches the emoji packages; install Node.js, or give --icons FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--silent", "--no-save", "--prefix", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise InputError(
            f"npm could not fetch the emoji packages ({reason}); check the network, or give --icons FOLDER"
        )
    return modules


def list_drawings(modules: Path) -> tuple[list[Drawing], list[str]]:
    """Every usable emoji in every style that draws it, in a fixed order, with its SVG text."""
    emoji = [e for e in _read_json(modules / "emojibase-data/en/data.json") if _is_usable(e)]
    entries, svgs = [], []
    for style, package in PACKAGES.items():
        root = modules / package.rsplit("@", 1)[0]
        icons, characters = _read_json(root / "icons.json"), _read_json(root / "chars.json")
        names = {_normal_code(code): name for code, name in characters.items()}
        for e in sorted(emoji, key=lambda e: e["order"]):
            code = _normal_code(e["hexcode"])
            if code in names:
                tags = tuple(t for t in e.get("tags", []) if t not in e["label"])
                held_out = is_held_out(code, style)
                entries.append(Drawing(code, e["label"].lower(), tags, GROUPS[e["group"]], style, held_out))
                svgs.append(_svg(icons, names[code]))
    return entries, svgs


def is_held_out(code: str, style: str) -> bool:
    """Whether this emoji in this style is kept for testing. At most one style of an emoji is."""
    digest = hashlib.sha256(code.encode()).digest()
    return digest[0] < 256 * HELD_OUT_SHARE and list(PACKAGES)[digest[1] % len(PACKAGES)] == style


def render(svg: str, size: int) -> Tensor:
    """SVG text -> (3, size, size) uint8 on white."""
    import resvg_py
    from PIL import Image

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return (
        torch.from_numpy(np.array(Image.alpha_composite(white, picture).convert("RGB"))).permute(2, 0, 1).contiguous()
    )


def _is_usable(emoji: dict[str, Any]) -> bool:
    # Joined people (gendered professions and the like) and clock faces differ in details that no small picture shows.
    joined_person = emoji.get("group") == 1 and "200D" in emoji["hexcode"]
    clock = "o\u2019clock" in emoji["label"] or emoji["label"].endswith("-thirty")
    return emoji.get("group") in GROUPS and not joined_person and not clock


def _normal_code(code: str) -> str:
    """Lower case, without the variation selector, which the packages write or leave out as they please."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _svg(icons: dict[str, Any], name: str) -> str:
    flip = False
    while name in icons.get("aliases", {}):
        alias = icons["aliases"][name]
        flip, name = flip != bool(alias.get("hFlip")), alias["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = f'<g transform="translate({width} 0) scale(-1 1)">{icon["body"]}</g>' if flip else icon["body"]
    side = max(width, height)  # a few icons are not square
    box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise InputError(f"{path} is missing; give --icons the node_modules folder with {', '.join(PACKAGES.values())}")
    return json.loads(path.read_text())
