"""Pictures composed from drawings: on coloured grounds, of several sizes, alone, in numbers and in pairs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.recipes.emoji.colours import HUES, main_hue, recolour
from trainer.recipes.emoji.data import Drawing

GROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "grey": (150, 152, 156),
    "red": (222, 60, 62),
    "orange": (250, 160, 60),
    "yellow": (252, 222, 90),
    "green": (90, 176, 96),
    "light green": (190, 226, 170),
    "blue": (64, 120, 216),
    "light blue": (170, 214, 246),
    "purple": (140, 90, 190),
    "pink": (250, 178, 204),
    "brown": (142, 98, 66),
    "beige": (240, 224, 196),
}
"""Colour word -> red, green, blue."""
BLACK_STYLES = ("silhouette", "ink")
"""The styles that cannot be seen on a black ground."""
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLACES = {
    1: ((0.5, 0.5, 1.0),),
    2: ((0.26, 0.5, 0.5), (0.74, 0.5, 0.5)),
    3: ((0.5, 0.28, 0.48), (0.26, 0.73, 0.48), (0.74, 0.73, 0.48)),
    4: ((0.26, 0.27, 0.48), (0.74, 0.27, 0.48), (0.26, 0.73, 0.48), (0.74, 0.73, 0.48)),
}
"""The places of things: x and y of its middle and its width, as shares of the picture."""
SEVERAL_SHARE, PAIR_SHARE = 0.3, 0.2
"""Shares of the scenes that show one thing several times, and two things side by side."""
COLOURED_SHARE = 0.5
"""Share of the other scenes in which the thing gets another colour, if it has one."""
COUNTED = ("animals", "food", "travel", "activities", "objects", "smileys")
"""Groups whose names have a plural."""
GROUND_PHRASES = ("on a {} ground", "on a {} background", "on {}", "{} background")
SHADE_SPREAD = 12
"""The spread of a ground's colour, of 255."""


@dataclass(frozen=True)
class Scene:
    """What a composed picture shows."""

    drawings: tuple[int, ...]
    """Numbers of the drawings in their places; the same one again where it is shown several times."""
    ground: str
    colour: str
    """The colour of the thing itself; empty for its own."""
    seed: int
    """The seed of the shade, and of small shifts."""

    @property
    def is_pair(self) -> bool:
        return len(set(self.drawings)) == 2

    def caption(self, entries: Sequence[Drawing], generator: torch.Generator) -> str:
        """What is to be seen, in varied words: "two red apples on a light blue ground, noto style"."""
        first, last = (entries[i] for i in (self.drawings[0], self.drawings[-1]))
        name = coloured_name(first.label, self.colour)
        if self.is_pair:
            text = f"a {name} and a {last.label}"
        elif len(self.drawings) > 1:
            text = f"{NUMBERS[len(self.drawings)]} {plural(name)}"
        else:
            text = (name, f"a {name}")[int(torch.randint(2, (), generator=generator))]
        if self.ground != "white":
            phrase = GROUND_PHRASES[int(torch.randint(len(GROUND_PHRASES), (), generator=generator))]
            phrase = phrase.format(self.ground)
            text += f" {phrase}" if phrase.startswith("on ") else f", {phrase}"
        text = re.sub("(^| )a(?= [aeiou])", r"\1an", text)
        return f"{text}, {first.style} style"

    def picture(self, images: Tensor, size: int) -> Tensor:
        """Float (3, size, size) in [0, 255] from all drawings (N, 4, S, S)."""
        generator = torch.Generator().manual_seed(self.seed)
        picture = shade(self.ground, size, generator)
        alone = len(self.drawings) == 1
        for number, (x, y, width) in zip(self.drawings, PLACES[len(self.drawings)], strict=True):
            shrunk, right, down = torch.rand(3, generator=generator).tolist()
            side = int(size * width * (1 - (0.4 if alone else 0.1) * shrunk))
            spare = (size - side) * 0.5 if alone else size * 0.03
            left = round(size * x - side / 2 + (2 * right - 1) * spare)
            top = round(size * y - side / 2 + (2 * down - 1) * spare)
            drawing = images[number].float()
            paste(picture, recolour(drawing, self.colour) if self.colour else drawing, top, left, side)
        return picture


def draw_scene(entries: Sequence[Drawing], images: Tensor, allowed: Tensor, seed: int) -> Scene:
    """A scene of some of the `allowed` drawings (their numbers), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    kind, colour = torch.rand(2, generator=generator).tolist()
    first = int(allowed[torch.randint(len(allowed), (), generator=generator)])
    drawings: tuple[int, ...] = (first,)
    if kind < SEVERAL_SHARE and entries[first].group in COUNTED:
        drawings *= int(torch.randint(2, 5, (), generator=generator))
    elif kind > 1 - PAIR_SHARE:
        for other in allowed[torch.randint(len(allowed), (64,), generator=generator)].tolist():
            if entries[other].style == entries[first].style and entries[other].code != entries[first].code:
                drawings = (first, other)
                break
    names = [name for name in GROUNDS if name != "black" or entries[first].style not in BLACK_STYLES]
    ground = names[int(torch.randint(len(names), (), generator=generator))]
    new = list(HUES)[int(torch.randint(len(HUES), (), generator=generator))]
    pair = len(set(drawings)) == 2
    takes_colour = colour < COLOURED_SHARE and not pair and hue_can_change(entries[first], images[first], new)
    return Scene(drawings, ground, new if takes_colour else "", seed)


def hue_can_change(entry: Drawing, image: Tensor, colour: str) -> bool:
    """Whether the drawing has one colour, another than this, and is not of a face or a person."""
    hue = None if entry.group in ("smileys", "people") else main_hue(image.float())
    return hue is not None and abs((hue - HUES[colour] + 180) % 360 - 180) > 30


def coloured_name(name: str, colour: str) -> str:
    """A thing's name with this colour in the place of its own, if it names one."""
    if not colour:
        return name
    own = "|".join(HUES)
    return f"{colour} " + re.sub(f"^({own}) ", "", name)


def plural(name: str) -> str:
    """Several of what the first noun says: "slices of pizza", "red apples", "cherries"."""
    head, *rest = re.split(r"(?=(?: of | with | in | on |: ))", name, maxsplit=1)
    if re.search("(s|x|ch|sh)$", head):
        head += "" if head.endswith("s") and not head.endswith("ss") else "es"
    elif re.search("[^aeiou]y$", head):
        head = f"{head[:-1]}ies"
    else:
        head += "s"
    return head + "".join(rest)


def paste(ground: Tensor, drawing: Tensor, top: int, left: int, size: int) -> None:
    """Put a drawing (4, s, s) with opacity onto `ground` (3, S, S), float in [0, 255], at `size` pixels, in place.

    What would lie outside of the ground is left out.
    """
    scaled = resize(drawing.float()[None], size)[0]
    height, width = ground.shape[-2:]
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + size, height), min(left + size, width)
    piece = scaled[:, y0 - top : y1 - top, x0 - left : x1 - left]
    ground[:, y0:y1, x0:x1] = piece[:3] + (1 - piece[3:] / 255) * ground[:, y0:y1, x0:x1]


def resize(pictures: Tensor, size: int) -> Tensor:
    """Float pictures (B, C, S, S) at `size` pixels, each new pixel the mean of what it covers."""
    if pictures.shape[-1] == size:
        return pictures
    return F.interpolate(pictures, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def random_ground(size: int, generator: torch.Generator) -> Tensor:
    """A plain ground (3, size, size) of any of the colours, float in [0, 255]."""
    names = list(GROUNDS)
    return shade(names[int(torch.randint(len(names), (), generator=generator))], size, generator)


def shade(name: str, size: int, generator: torch.Generator) -> Tensor:
    """A plain ground (3, size, size) in a shade of this colour, float in [0, 255]; white is always white."""
    colour = torch.tensor(GROUNDS[name], dtype=torch.float32)
    spread = SHADE_SPREAD * torch.randn(3, generator=generator)
    if name != "white":
        colour = (colour + spread).clamp(0, 255)
    return colour[:, None, None].expand(3, size, size).clone()
