"""Make the example workflows again: `COMFYUI_PATH=~/ComfyUI python workflows/make.py [NAME...]`.

Writes `api/NAME.json` from `graphs.py`, runs it on a real ComfyUI for the thumbnail `NAME.jpg`, and has ComfyUI's own
page draw it as `NAME.json`, with its note. Needed after a change of `graphs.py`, of a node's inputs or of the embedded
model. Asks for Pillow, playwright and a Chromium beside ComfyUI.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from browser import Browser
from comfyui import Server, make_base
from graphs import WORKFLOWS, note_of, prompt_of
from PIL import Image, ImageSequence

HERE = Path(__file__).resolve().parent
THUMBNAIL = 384  # pixels


def main(names: list[str]) -> None:
    """Make all workflows, or those named."""
    checkout = os.environ.get("COMFYUI_PATH")
    if not checkout or set(names) - set(WORKFLOWS):
        sys.exit(f"set COMFYUI_PATH to a ComfyUI checkout, and name some of {', '.join(WORKFLOWS)}, or none for all")
    with tempfile.TemporaryDirectory() as base, Server(Path(checkout), make_base(Path(base))) as server:
        make(server, names or list(WORKFLOWS))


def make(server: Server, names: list[str]) -> None:
    """Make workflows with a running ComfyUI."""
    prompts = {name: prompt_of(name) for name in names}
    with Browser(server.url) as page:  # closed before anything is painted: it takes a processor of its own
        for name, prompt in prompts.items():
            write_json(HERE / "api" / f"{name}.json", prompt)
            write_json(HERE / f"{name}.json", page.draw(prompt, name, note_of(name)))
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


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write JSON as people read it."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
