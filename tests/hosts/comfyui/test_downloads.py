"""The templates whose models are to be downloaded, run by a real ComfyUI on stand-ins of the same names and layouts."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import pytest
from comfyui import Server, make_base
from downloads import DOWNLOADS
from PIL import Image

from tests.hosts.comfyui.stand_ins import write_stand_ins

if TYPE_CHECKING:
    from browser import Chromium

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).resolve().parents[3] / "workflows"
SIDE = 128  # pixels; the templates' own size takes a processor minutes
DISK, MEMORY = 15e9, 16e9  # bytes that are to be free
FLAT = 8.0  # grey levels; a plain colour has a spread of 0, noise one of 60 and more
SAID = {
    "LCM 12 SD 1.5 in 4 steps (download)": "guidance 1.5, lcm, 4 steps; model with LoRA on 278 layers (SD 1.x, ",
    "LCM 13 SDXL in 4 steps (download)": "guidance 1.5, lcm, 4 steps; model with LoRA on 788 layers (SDXL, ",
    "LCM 14 Qwen-Image in 4 steps (download)": "guidance 1, lcm, 4 steps; model with LoRA on 12 layers (QwenImage, ",
}
"""What LCM KSampler begins its line with: all that the LoRAs hold, in the layout of the published ones."""
_COMPLAINTS = re.compile(r"lora key not loaded|(unet|clip) (missing|unexpected)|left over keys|Traceback|ERROR lora")
_SIZE = """(side) => {
  const [empty] = app.graph._nodes.filter((node) => node.type.startsWith("Empty"));
  for (const widget of empty.widgets) if (["width", "height"].includes(widget.name)) widget.value = side;
  const [sampler] = app.graph._nodes.filter((node) => node.type === "LCMKSampler");
  sampler.widgets.find((widget) => widget.name === "seed").value = 2;
}"""
_SAID = """(said) => app.graph._nodes.some((node) => node.type === "LCMKSampler" && (node.widgets ?? []).some(
  (widget) => String(widget.value).startsWith(said)
))"""


class Ready(NamedTuple):
    """A template, and a host that has its files."""

    name: str
    server: Server


@pytest.fixture(scope="module", params=DOWNLOADS)
def ready(request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ready]:
    """A host with a template's files; both are gone afterwards."""
    base = make_base(tmp_path_factory.mktemp("downloads"))
    psutil = pytest.importorskip("psutil", reason="psutil is not installed; it tells how much memory is free")
    for free, needed, what in (
        (shutil.disk_usage(base).free, DISK, "on the disk"),
        (psutil.virtual_memory().available, MEMORY, "of memory"),
    ):
        if free < needed:
            pytest.skip(f"{free / 1e9:.0f} GB {what} are free; models of real size want {needed / 1e9:.0f}")
    files = write_stand_ins(base / "models", _files(request.param), checkout)
    try:
        with Server(checkout, base, "--fp16-unet") as server:  # half of the memory; a processor would take float32
            yield Ready(request.param, server)
    finally:
        for file in files:
            file.unlink()


def _drawn(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _files(name: str) -> list[str]:
    """What the template says is to be downloaded."""
    return [link["name"] for node in _drawn(name)["nodes"] for link in node["properties"].get("models", ())]


def _picture(server: Server, outputs: dict[str, Any]) -> Image.Image:
    [image] = [image for output in outputs.values() for image in output.get("images", ())]
    return Image.open(io.BytesIO(server.file(image))).convert("RGB")


def _check(ready: Ready, picture: Image.Image) -> None:
    """A picture of the size asked for, no plain colour; every weight found its place, and the node says so."""
    log = ready.server.log.read_text()
    assert picture.size == (SIDE, SIDE)
    assert numpy.asarray(picture, int).std() > FLAT
    assert f"LCMKSampler: {SAID[ready.name]}" in log
    assert _COMPLAINTS.findall(log) == []


def test_a_template_paints_once_its_files_are_there(ready: Ready) -> None:
    """Wrong when a file of a published layout is not loaded, or only in part, or a node fails on it."""
    prompt = json.loads((FOLDER / "api" / f"{ready.name}.json").read_text(encoding="utf-8"))
    [empty] = [node["inputs"] for node in prompt.values() if "batch_size" in node["inputs"]]
    empty.update(width=SIDE, height=SIDE)
    _check(ready, _picture(ready.server, ready.server.run(prompt)))


def test_a_template_paints_from_the_page(ready: Ready, chromium: Chromium) -> None:
    """Wrong when the drawn graph does not run in the browser, a node turns red, or its line is not shown on it."""
    from browser import Browser

    known = set(ready.server.get("/history"))
    with Browser(ready.server.url, chromium) as page:
        page.errors.clear()
        page.load(_drawn(ready.name))
        page.evaluate(_SIZE, SIDE)
        page.evaluate("() => app.queuePrompt(0, 1)")
        queue = ready.server.get("/queue")
        jobs = {job[1] for part in queue.values() for job in part} | set(ready.server.get("/history"))
        [number] = jobs - known
        _check(ready, _picture(ready.server, ready.server.wait(number)))
        page.page.wait_for_function(_SAID, arg=SAID[ready.name])
        assert page.faulty() == (set(), set())
        assert page.errors == []
