"""The example workflows on ComfyUI's page, in a real browser."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from blueprints import BLUEPRINTS
from comfyui import Server
from downloads import DOWNLOADS, HUB, MODELS
from graphs import WORKFLOWS, note_of

if TYPE_CHECKING:
    from browser import Browser, Chromium

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "workflows"
_DROP = """async (bytes) => {
  const data = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
  app.graph.clear();
  await app.handleFile(new File([data], "picture.png", { type: "image/png" }));
}"""
_DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJ"
    "RU5ErkJggg=="
)
_PICTURES_LOADED = """() => {
  const pictures = [...document.querySelectorAll(".lcm-suite-panel img")];
  return pictures.length === 2 && pictures.every((each) => each.naturalWidth === 64);
}"""
_PANEL_FITS = """(number) => {
  const node = app.graph.getNodeById(number);
  const bottom = app.canvas.canvas.getBoundingClientRect().top + app.canvas.ds.scale * (
    node.pos[1] + node.size[1] + app.canvas.ds.offset[1]
  );
  const parts = [...document.querySelectorAll(".lcm-suite-panel *")].map((part) => part.getBoundingClientRect().bottom);
  return Math.max(...parts) > 0 && Math.max(...parts) <= bottom + 1;
}"""
_IS_SHOWN = "(pattern) => new RegExp(pattern).test(document.body.innerText)"
_LIST_FILES = "() => app.refreshComboInNodes()"
_DIALOG = ".p-dialog-mask"
_CENTER = "(number) => app.canvas.centerOnNode(app.graph.getNodeById(number))"
_SET = """(wanted) => {
  for (const node of app.graph._nodes)
    for (const [name, value] of Object.entries(wanted[node.type] ?? {}))
      node.widgets.find((widget) => widget.name === name).value = value;
}"""
_INTO_SUBGRAPH = """async (number) => {
  const { node } = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(number)]));
  const { output } = await app.graphToPrompt();
  const [key] = Object.keys(output).filter((each) => output[each].class_type === "LCMDistiller");
  return [node.id, key];
}"""
_TEXT_INSIDE = """(number) => {
  const [node] = app.graph.getNodeById(number).subgraph._nodes;
  return node.widgets.find((widget) => widget.name === "panel").element.textContent;
}"""
_COUNT = "() => app.graph._nodes.filter((node) => node.type !== 'MarkdownNote').length"


def _drawn(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def _plain(prompt: dict[str, Any]) -> dict[str, Any]:
    """Without titles, which say nothing to the server."""
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in prompt.items()}


@pytest.fixture
def downloaded(page: Browser, server: Server) -> Iterator[None]:
    """Files of the names that the templates want downloaded, with nothing in them."""
    files = [server.base / "models" / folder / name for name, (folder, _) in MODELS.items()]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    page.evaluate(_LIST_FILES)
    yield
    for file in files:
        file.unlink()
    page.evaluate(_LIST_FILES)


@pytest.mark.parametrize("name", [*WORKFLOWS, *DOWNLOADS])
def test_a_drawn_workflow_is_the_tested_one(page: Browser, name: str) -> None:
    """Wrong when a node is missing on the page, a link is wrong, a widget's value has slipped, or the note is lost."""
    page.errors.clear()
    expected = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert _plain(page.load(_drawn(name))) == _plain(expected)
    assert page.errors == []
    unknown, marked = page.faulty()
    assert unknown == set()
    assert marked <= {node["type"] for node in _drawn(name)["nodes"] if "models" in node["properties"]}
    [note] = [node for node in _drawn(name)["nodes"] if node["type"] == "MarkdownNote"]
    assert note["widgets_values"] == [note_of(name)]


@pytest.mark.usefixtures("downloaded")
@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_workflow_is_whole_once_its_files_are_there(page: Browser, name: str) -> None:
    """Wrong when a file is sought in another folder than its link says, or a loader is marked for another reason than
    its missing file."""
    page.load(_drawn(name))
    page.page.wait_for_timeout(2000)  # newer pages look for the files after the graph is there
    assert page.faulty() == (set(), set())


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_workflow_names_all_files_that_are_to_be_downloaded(name: str) -> None:
    """Wrong when a loader's file has no link, or one of another folder than the loader looks into."""
    linked, chosen = {}, set()
    for node in _drawn(name)["nodes"]:
        links = node["properties"].get("models", [])
        linked |= {link["name"]: (link["directory"], link["url"]) for link in links}
        chosen |= {value for value in node.get("widgets_values") or () if str(value).endswith(".safetensors")}
    assert linked == {file: MODELS[file] for file in chosen}


def test_the_page_offers_what_is_missing(server: Server, chromium: Chromium) -> None:
    """Wrong when the page does not list one of a template's missing files with its folder, or looks for it at another
    address than ours."""
    from browser import Browser

    with Browser(server.url, chromium) as page:
        asked: set[str] = set()
        page.page.context.route(f"{HUB}/**", lambda route: (asked.add(route.request.url), route.fulfill(body="")))
        for name in DOWNLOADS:
            page.load(_drawn(name))
            linked = [link for node in _drawn(name)["nodes"] for link in node["properties"].get("models", [])]
            details, listed = page.page.get_by_text("View details"), page.page.get_by_text(linked[0]["name"])
            details.or_(listed).first.wait_for()
            if details.is_visible():
                details.click()
            for link in linked:
                file, folder = re.escape(link["name"]), link["directory"]
                page.page.wait_for_function(_IS_SHOWN, arg=rf"{file}\s+{folder}|{folder} / {file}")
            assert {link["url"] for link in linked} <= asked


@pytest.mark.usefixtures("with_blueprints")
@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_goes_into_any_graph(page: Browser, name: str) -> None:
    """Wrong when the page cannot draw it, its subgraph is not made of what is in the blueprint, or a node of that is
    unknown or marked."""
    page.errors.clear()
    drawn = json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))
    page.load(drawn)
    [subgraph] = drawn["definitions"]["subgraphs"]
    shown = page.evaluate("() => app.graph._nodes.map((node) => [node.title, node.isSubgraphNode?.() ?? false])")
    assert shown == [[name, True]]
    inside = page.evaluate("() => app.graph._nodes[0].subgraph._nodes.map((node) => node.type)")
    assert sorted(inside) == sorted(node["type"] for node in subgraph["nodes"])
    assert page.faulty(inside=True) == (set(), set())
    widgets = page.evaluate("() => app.graph._nodes[0].widgets.map((widget) => widget.name)")
    assert {"guidance_scale"} <= set(widgets)
    assert page.errors == []


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
    for language in ("ko", "ja", "zh"):
        pages = page.evaluate(
            "async ([names, language]) => Promise.all(names.map(async (name) => "
            "(await fetch(`/extensions/lcm-suite/docs/${name}/${language}.md`)).status))",
            [nodes, language],
        )
        assert pages == [200] * len(nodes), language


def _distiller(page: Browser, drawn: dict[str, Any]) -> int:
    """Open a graph with one LCM Distiller and bring that into view; returns its number."""
    page.load(drawn)
    [number] = [node["id"] for node in drawn["nodes"] if node["type"] == "LCMDistiller"]
    page.evaluate(_CENTER, number)
    for _ in range(10):  # what an earlier graph has brought up, such as a list of missing models
        if page.page.locator(_DIALOG).count():
            page.page.keyboard.press("Escape")
            page.page.wait_for_timeout(500)
    return number


def test_the_panel_follows_a_run(page: Browser) -> None:
    """Wrong when the page does not hear of a run, its buttons and pictures are not shown, or anything of it reaches
    over the node's edge; nothing of it is saved."""
    number = _distiller(page, _drawn("LCM 09 Distil your own LCM-LoRA"))
    told = {"step": 12, "steps": 40, "losses": [0.5, 0.3, 0.2], "seconds_left": 75, "before": _DOT, "after": _DOT}
    told |= {"running": True, "saved": 10, "node": str(number)}
    page.evaluate("(told) => app.api.dispatchCustomEvent('lcm_suite.distiller', told)", told)
    panel = page.page.locator(".lcm-suite-panel")
    panel.get_by_text("step 12 of 40, 1:15 left, loss 0.200, saved at 10").wait_for(timeout=20_000)
    assert panel.locator("button").all_text_contents() == ["Stop and keep", "Save now"]
    assert (
        panel.locator("img").evaluate_all("(pictures) => pictures.map((each) => each.src.slice(0, 10))")
        == ["data:image"] * 2
    )
    assert "lcm_suite_panel" not in json.dumps(page.evaluate("() => app.graph.serialize()"))
    page.page.wait_for_function(_PANEL_FITS, arg=number, timeout=20_000)


def test_a_panel_in_a_subgraph_follows_too(page: Browser) -> None:
    """Wrong when the server's name of a node inside of a subgraph is not understood."""
    number = _distiller(page, _drawn("LCM 09 Distil your own LCM-LoRA"))
    outer, name = page.evaluate(_INTO_SUBGRAPH, number)
    told = {"step": 12, "steps": 40, "losses": [0.5], "seconds_left": 75, "running": True, "saved": None, "node": name}
    page.evaluate("(told) => app.api.dispatchCustomEvent('lcm_suite.distiller', told)", told)
    assert "step 12 of 40, 1:15 left, loss 0.500" in page.evaluate(_TEXT_INSIDE, outer)


def test_a_run_is_saved_and_stopped_by_the_panels_buttons(page: Browser, server: Server) -> None:
    """Wrong when a click reaches no button, "Save now" writes no file or ends the run, a page that is loaded anew knows
    less than the one before, or "Stop" loses what was learnt since."""
    drawn = _drawn("LCM 09 Distil your own LCM-LoRA")
    short = {"EmptyLatentImage": {"batch_size": 2}, "KSampler": {"steps": 2}}
    short["LCMDistiller"] = {"output_name": "stopped", "steps": 1000, "batch_size": 1, "preview_every": 1000}
    number = _distiller(page, drawn)
    page.evaluate(_SET, short)
    page.evaluate("() => app.queuePrompt(0, 1)")
    panel, lora = page.page.locator(".lcm-suite-panel"), server.base / "models" / "loras" / "stopped.safetensors"
    panel.get_by_text(re.compile("^step [1-9]")).wait_for()
    page.page.wait_for_function(_PANEL_FITS, arg=number)
    page.evaluate(_CENTER, number)  # it has grown
    assert not lora.exists()
    panel.get_by_role("button", name="Save now").click()
    panel.get_by_text(re.compile("saved at [1-9]")).wait_for()
    saved = lora.read_bytes()
    panel.get_by_text(re.compile(r"^step (\d+) of 1000.*, saved at (?!\1$)")).wait_for()  # it goes on
    assert len(server.get("/queue")["queue_running"]) == 1
    page.open()
    _distiller(page, drawn)
    panel.get_by_text(re.compile(r"^step \d+ of 1000.*, saved at ")).wait_for()
    page.page.wait_for_function(_PICTURES_LOADED)  # the page that is loaded anew asks the server for them
    page.page.wait_for_function(_PANEL_FITS, arg=number)
    page.evaluate(_CENTER, number)
    panel.get_by_role("button", name="Stop and keep").click()
    panel.get_by_text(re.compile(r"^step (\d+) of 1000, loss .*, saved at \1$")).wait_for()
    page.page.wait_for_function("async () => (await (await fetch('/queue')).json()).queue_running.length === 0")
    assert panel.get_by_role("button").count() == 0  # of those that are shown
    entry = next(reversed(server.get("/history").values()))
    assert "execution_interrupted" in [name for name, _ in entry["status"]["messages"]]
    assert lora.read_bytes() != saved
    logged = (server.base / "output" / "lcm_suite" / "stopped" / "log.jsonl").read_text().splitlines()
    assert panel.get_by_text(re.compile(f"^step {len(logged)} of 1000")).count() == 1
