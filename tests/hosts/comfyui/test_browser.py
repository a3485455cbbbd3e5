"""The example workflows on ComfyUI's page, in a real browser."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from comfyui import Server
from graphs import WORKFLOWS, note_of

if TYPE_CHECKING:
    from browser import Browser

FOLDER = Path(__file__).resolve().parents[3] / "workflows"
_DROP = """async (bytes) => {
  const data = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
  app.graph.clear();
  await app.handleFile(new File([data], "picture.png", { type: "image/png" }));
}"""
_COUNT = "() => app.graph._nodes.filter((node) => node.type !== 'MarkdownNote').length"


def _drawn(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _plain(prompt: dict[str, Any]) -> dict[str, Any]:
    """Without titles, which say nothing to the server."""
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in prompt.items()}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_drawn_workflow_is_the_tested_one(page: Browser, name: str) -> None:
    """Wrong when a node is missing on the page, a link is wrong, a widget's value has slipped, or the note is lost."""
    page.errors.clear()
    expected = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert _plain(page.load(_drawn(name))) == _plain(expected)
    assert page.errors == []
    assert page.evaluate("() => app.graph._nodes.filter((node) => node.has_errors || !node.comfyClass).length") <= 1
    [note] = [node for node in _drawn(name)["nodes"] if node["type"] == "MarkdownNote"]
    assert note["widgets_values"] == [note_of(name)]


def test_a_picture_brings_its_workflow_back(page: Browser, server: Server) -> None:
    """Wrong when a picture made from the page does not carry the graph, note and all."""
    drawn = _drawn("LCM 01 Text to image in 4 steps")
    page.load(drawn)
    before = set((server.base / "output").rglob("*.png"))
    page.evaluate("() => app.queuePrompt(0, 1)")
    page.page.wait_for_function("async () => (await (await fetch('/queue')).json()).queue_running.length === 0")
    for _ in range(600):
        made = sorted(set((server.base / "output").rglob("*.png")) - before)
        if made:
            break
        page.page.wait_for_timeout(500)
    page.evaluate(_DROP, base64.b64encode(made[0].read_bytes()).decode())
    page.page.wait_for_function(f"() => ({_COUNT})() === {len(drawn['nodes']) - 1}")
    back = page.evaluate("async () => (await app.graphToPrompt()).output")
    sampler = next(node for node in back.values() if node["class_type"] == "LCMKSampler")
    assert sampler["inputs"]["steps"] == 4
    assert page.evaluate("() => app.graph._nodes.filter((node) => node.type === 'MarkdownNote').length") == 1


def test_every_node_has_a_help_page(page: Browser, server: Server) -> None:
    """Wrong when the help panel of a node of the suite is empty."""
    nodes = [name for name, node in server.get("/object_info").items() if node["category"] == "LCM Suite"]
    assert nodes
    fetched = page.evaluate(
        "async (names) => Promise.all(names.map(async (name) => "
        "(await fetch(`/extensions/lcm-suite/docs/${name}.md`)).status))",
        nodes,
    )
    assert fetched == [200] * len(nodes)
