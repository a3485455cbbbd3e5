"""The icon packages: fetched with npm, listed as drawings with names, and rendered."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors, write_safetensors
from trainer.recipes.emoji.data import CORE, GROUPS, Drawing, Drawings, is_held_out, read_entries, write_entries


@dataclass(frozen=True)
class IconSet:
    """A published set of drawings."""

    package: str
    """The npm package, with its version."""
    credit: str
    """Name, makers and licence."""

    @property
    def folder(self) -> str:
        """The folder below `node_modules`."""
        return self.package.rsplit("@", 1)[0]


SETS = {
    "noto": IconSet("@iconify-json/noto@1.2.9", "Noto Emoji, Google, Apache License 2.0"),
    "fluent": IconSet("@iconify-json/fluent-emoji-flat@1.2.6", "Fluent Emoji (flat), Microsoft, MIT License"),
    "twemoji": IconSet("@iconify-json/twemoji@1.2.5", "Twemoji, Twitter and contributors, CC-BY 4.0"),
    "blob": IconSet("@iconify-json/noto-v1@1.2.5", "Noto Emoji (first version), Google, Apache License 2.0"),
    "gradient": IconSet("@iconify-json/fluent-emoji@1.2.7", "Fluent Emoji (colour), Microsoft, MIT License"),
    "firefox": IconSet("@iconify-json/fxemoji@1.2.2", "FxEmojis, Mozilla, Apache License 2.0"),
    "emojione": IconSet("@iconify-json/emojione@1.2.3", "EmojiOne 2, Ranks.com, CC-BY 4.0"),
    "silhouette": IconSet("@iconify-json/emojione-monotone@1.2.1", "EmojiOne (monotone), Ranks.com, CC-BY 4.0"),
    "ink": IconSet("@iconify-json/fluent-emoji-high-contrast@1.2.6", "Fluent Emoji (high contrast), Microsoft, MIT"),
}
"""Style word -> the set that draws it."""
NAMES_PACKAGE = "emojibase-data@17.0.0"
NAME_LISTS = ("cldr", "emojibase", "iamcal", "joypixels")
"""Other names of the emoji, from the names' package: what sets without code points call their drawings."""


def load_drawings(folder: Path, size: int, icons: Path | None = None) -> Drawings:
    """The drawings at `size` pixels, rendered on the first call and read from `folder` afterwards.

    Args:
        folder: where the rendered pictures are kept.
        size: width and height in pixels.
        icons: a folder with the npm packages (`node_modules`); fetched with npm into `folder` where not given.
    """
    pictures, words = folder / f"drawings-{size}.safetensors", folder / f"drawings-{size}.json"
    if not (pictures.exists() and words.exists()):
        entries, svgs = list_drawings(icons or fetch_packages(folder))
        images = torch.stack([render(svg, size) for svg in svgs])
        write_entries(words, entries)
        write_safetensors(pictures, {"images": images}, {})
    return Drawings(read_safetensors(pictures)[0]["images"], read_entries(words))


def fetch_packages(folder: Path) -> Path:
    """Install the icon packages with npm into `folder`. Returns its `node_modules`.

    Raises:
        InputError: npm is missing or could not fetch the packages.
    """
    modules = folder / "node_modules"
    packages = [*(icon_set.package for icon_set in SETS.values()), NAMES_PACKAGE]
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
    emoji = list(_usable_emoji(_read_json(modules / "emojibase-data/en/data.json")))
    names = _names_of(emoji, modules / "emojibase-data/en/shortcodes")
    entries, svgs = [], []
    for style, icon_set in SETS.items():
        root = modules / icon_set.folder
        icons, characters = _read_json(root / "icons.json"), _read_json(root / "chars.json")
        found = _find_icons(icons, characters, names)
        for e in emoji:
            code = _normal_code(e["hexcode"])
            if code in found and (style in CORE or "tone" not in e):
                tags = tuple(t for t in e.get("tags", []) if t not in e["label"])
                label = e["label"].lower()
                entries.append(Drawing(code, label, tags, GROUPS[e["group"]], style, is_held_out(code, style)))
                svgs.append(_svg(icons, found[code]))
    return entries, svgs


def render(svg: str, size: int) -> Tensor:
    """SVG text -> (4, size, size) uint8: red, green, blue, each multiplied by the fourth, the opacity."""
    import resvg_py
    from PIL import Image

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    picture = np.array(Image.open(io.BytesIO(png)).convert("RGBA").convert("RGBa"))
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous()


def _usable_emoji(listed: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All that can be used, in Unicode's order, each followed by its tones of skin."""
    for e in sorted((e for e in listed if _is_usable(e)), key=lambda e: e["order"]):
        yield e
        yield from ({**s, "tags": e.get("tags", [])} for s in e.get("skins", []) if isinstance(s.get("tone"), int))


def _is_usable(emoji: dict[str, Any]) -> bool:
    # Joined people (gendered professions and the like) and clock faces differ in details that no small picture shows.
    joined_person = emoji.get("group") == 1 and "200D" in emoji["hexcode"]
    clock = "o\u2019clock" in emoji["label"] or emoji["label"].endswith("-thirty")
    return emoji.get("group") in GROUPS and not joined_person and not clock


def _names_of(emoji: list[dict[str, Any]], lists: Path) -> dict[str, str]:
    """Name without spaces -> code; an emoji's own label goes before all short names."""
    names = {_letters(e["label"]): _normal_code(e["hexcode"]) for e in emoji}
    for name in NAME_LISTS:
        short = _read_json(lists / f"{name}.json")
        for e in emoji:
            given = short.get(e["hexcode"], [])
            for word in [given] if isinstance(given, str) else given:
                names.setdefault(_letters(word), _normal_code(e["hexcode"]))
    return names


def _find_icons(icons: dict[str, Any], characters: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Code -> the set's own name, by code points where the set lists them, else by what the name says."""
    if characters:
        return {_normal_code(code): name for code, name in characters.items()}
    given = [*icons["icons"], *icons.get("aliases", {})]
    return {names[_letters(name)]: name for name in reversed(given) if _letters(name) in names}


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


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
        packages = ", ".join(icon_set.package for icon_set in SETS.values())
        raise InputError(f"{path} is missing; give --icons the node_modules folder with {packages}, {NAMES_PACKAGE}")
    return json.loads(path.read_text(encoding="utf-8"))
