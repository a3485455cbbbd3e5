"""ComfyUI's page in a real Chromium: API format to a drawn graph and back, as a person would see it."""

from __future__ import annotations

import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser as Chromium
from playwright.sync_api import ConsoleMessage, Page, sync_playwright

# Failures to reach the outside and notices of the page itself say nothing about a workflow.
_NOISE = ("net::ERR", "Failed to fetch", "Failed to load resource", "userdata", "preload", "Deprecat", "deprecat")

_SIZES = {
    "CLIPTextEncode": [320, 140],
    "SaveImage": [340, 380],
    "SaveAnimatedWEBP": [340, 420],
    "PreviewImage": [260, 280],
    "LoadImage": [280, 320],
}
_DRAW = """async ([api, name, note, sizes]) => {
  await app.loadApiJson(api, name);
  const graph = app.graph;
  for (const node of graph._nodes) {
    for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
    const least = sizes[node.comfyClass] ?? [270, 0];
    node.size = node.computeSize().map((side, axis) => Math.max(side, least[axis]));
  }
  graph.arrange(60);
  const box = LiteGraph.createNode("MarkdownNote");
  box.title = "Note";
  graph.add(box);
  box.widgets[0].value = note;
  box.size = [420, 380];
  const left = Math.min(...graph._nodes.map((node) => node.pos[0]));
  const top = Math.min(...graph._nodes.filter((node) => node !== box).map((node) => node.pos[1]));
  box.pos = [left - 480, top];
  return JSON.parse(JSON.stringify(graph.serialize()));
}"""
_GROUP = """async ([api, name, numbers, widgets]) => {
  await app.loadApiJson(api, name);
  const graph = app.graph;
  for (const node of graph._nodes)
    for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
  graph.arrange(60);
  const inside = graph._nodes.filter((node) => numbers.includes(String(node.id)));
  const { node } = graph.convertToSubgraph(new Set(inside));
  node.properties.proxyWidgets = widgets;
  return JSON.parse(JSON.stringify(graph.serialize()));
}"""
_NODES = """(inside) => (inside ? app.graph._nodes[0].subgraph : app.graph)._nodes.map(
  (node) => [node.type, Boolean(node.comfyClass), Boolean(node.has_errors)]
)"""
_LOAD = "async (drawn) => { await app.loadGraphData(drawn); return (await app.graphToPrompt()).output; }"


@contextmanager
def launch() -> Iterator[Chromium]:
    """Chromium: $CHROMIUM, or the system's. One at a time; any number of pages can be opened in it."""
    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM") or shutil.which("chromium")
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


class Browser:
    """`with Browser(url, chromium) as page:` opens the page; what goes wrong in its console is in `errors`.

    It is not the first visit, on which the page lays its templates over everything, at some time.
    """

    def __init__(self, url: str, chromium: Chromium) -> None:
        self.url, self._chromium = url, chromium
        self.errors: list[str] = []

    def __enter__(self) -> Browser:
        visited = urllib.request.Request(f"{self.url}/settings/Comfy.TutorialCompleted", b"true")
        visited.add_header("Content-Type", "application/json")
        urllib.request.urlopen(visited, timeout=60).close()
        self.page: Page = self._chromium.new_page(viewport={"width": 1600, "height": 1000})
        self.page.set_default_timeout(300_000)
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()

    def open(self) -> None:
        """Load the page, also anew."""
        self.page.goto(self.url)
        self.page.wait_for_function("() => window.app?.graph && window.LiteGraph?.registered_node_types.KSampler")

    def draw(self, prompt: dict[str, Any], name: str, note: str) -> dict[str, Any]:
        """A workflow in API format as a graph with a note, in the UI's format."""
        return self.page.evaluate(_DRAW, [prompt, name, note, _SIZES])

    def group(self, prompt: dict[str, Any], name: str, nodes: list[str], widgets: list[tuple[str, str]]) -> Any:
        """A workflow in API format as a graph in which some nodes are one subgraph, which shows some widgets."""
        return self.page.evaluate(_GROUP, [prompt, name, nodes, [list(widget) for widget in widgets]])

    def load(self, drawn: dict[str, Any]) -> dict[str, Any]:
        """Open a graph, and give it back in API format."""
        return self.page.evaluate(_LOAD, drawn)

    def faulty(self, inside: bool = False) -> tuple[set[str], set[str]]:
        """Types of the nodes that the page does not know, and of those that it marks as faulty.

        Args:
            inside: look into the subgraph that is the open graph's first node.
        """
        nodes = [node for node in self.page.evaluate(_NODES, inside) if node[0] != "MarkdownNote"]  # has no definition
        return {kind for kind, known, _ in nodes if not known}, {kind for kind, _, marked in nodes if marked}

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Run JavaScript in the page."""
        return self.page.evaluate(script, argument)

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(word in message.text for word in _NOISE):
            self.errors.append(message.text)
