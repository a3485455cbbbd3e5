"""Make the example workflows again: `COMFYUI_PATH=~/ComfyUI python workflows/make.py [NAME...]`.

Writes `api/NAME.json` from `graphs.py`, runs it on a real ComfyUI for the thumbnail `NAME.jpg`, and has ComfyUI's own
page draw it as `NAME.json`, with its note. Those of `downloads.py` are drawn alike, but not run: their models are not
here. The page also makes `subgraphs/NAME.json` of `blueprints.py`. Needed after a change of `graphs.py`, of a node's
inputs or of the embedded model. Asks for Pillow, playwright and a Chromium beside ComfyUI.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from blueprints import BLUEPRINTS, blueprint_of
from browser import Browser, launch
from comfyui import ROOT, Server, make_base
from downloads import DOWNLOADS, with_links
from graph import Graph
from graphs import WORKFLOWS, note_of, prompt_of
from PIL import Image, ImageDraw, ImageFont, ImageSequence

HERE = Path(__file__).resolve().parent
SUBGRAPHS = ROOT / "subgraphs"
THUMBNAIL = 384  # pixels


def main(names: list[str]) -> None:
    """Make all workflows and blueprints, or those named."""
    checkout, known = os.environ.get("COMFYUI_PATH"), [*WORKFLOWS, *DOWNLOADS, *BLUEPRINTS]
    if not checkout or set(names) - set(known):
        sys.exit(f"set COMFYUI_PATH to a ComfyUI checkout, and name some of {', '.join(known)}, or none for all")
    with tempfile.TemporaryDirectory() as base, Server(Path(checkout), make_base(Path(base))) as server:
        make(server, names or known)


def make(server: Server, names: list[str]) -> None:
    """Make workflows and blueprints with a running ComfyUI."""
    prompts = {name: prompt_of(name) for name in names if name in WORKFLOWS}
    # The page is closed before anything is painted: it takes a processor of its own.
    with launch() as chromium, Browser(server.url, chromium) as page:
        for name, prompt in prompts.items():
            write_json(HERE / "api" / f"{name}.json", prompt)
            write_json(HERE / f"{name}.json", page.draw(prompt, name, note_of(name)))
        for name in filter(DOWNLOADS.get, names):
            prompt = prompt_of(name)
            write_json(HERE / "api" / f"{name}.json", prompt)
            write_json(HERE / f"{name}.json", with_links(page.draw(prompt, name, note_of(name))))
            card(name).save(HERE / f"{name}.jpg", quality=90)
        for name in filter(BLUEPRINTS.get, names):
            graph = Graph()
            part = BLUEPRINTS[name](graph)
            drawn = page.group(graph.prompt, name, part.nodes, part.widgets)
            write_json(SUBGRAPHS / f"{name}.json", blueprint_of(name, drawn))
    for name, prompt in prompts.items():
        pictures = pictures_of(server, server.run(prompt))
        thumbnail(pictures).save(HERE / f"{name}.jpg", quality=90)
        print(f"{name}: {len(prompt)} nodes, {len(pictures)} pictures", flush=True)


def pictures_of(server: Server, outputs: dict[str, Any]) -> list[Image.Image]:
    """All pictures that a workflow saved; an animation's frames one by one."""
    saved = [image for output in outputs.values() for image in output.get("images", ())]
    opened = [Image.open(io.BytesIO(server.file(image))) for image in saved if image["type"] == "output"]
    return [frame.convert("RGB") for picture in opened for frame in ImageSequence.Iterator(picture)]


def thumbnail(pictures: list[Image.Image]) -> Image.Image:
    """Pictures side by side in a square, as large as a thumbnail."""
    across = next(side for side in range(1, 9) if side * side >= len(pictures))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (across * width, -(-len(pictures) // across) * height), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % across * width, number // across * height))
    scale = THUMBNAIL / max(sheet.size)
    return sheet.resize((round(sheet.width * scale), round(sheet.height * scale)), Image.Resampling.LANCZOS)


def card(name: str) -> Image.Image:
    """A card in place of a picture, which cannot be painted without the model: what the workflow is."""
    sheet = Image.new("RGB", (THUMBNAIL, THUMBNAIL), (36, 41, 56))
    draw = ImageDraw.Draw(sheet)
    model, _, steps = name.removesuffix(" (download)").split(" ", 2)[2].partition(" in ")
    draw.text((THUMBNAIL // 2, 170), model, "white", ImageFont.load_default(52), anchor="mm")
    draw.text((THUMBNAIL // 2, 230), f"in {steps}", (150, 200, 255), ImageFont.load_default(34), anchor="mm")
    return sheet


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write JSON as people read it."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
