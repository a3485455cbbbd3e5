"""A clone in custom_nodes as the whole installation."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from blueprints import BLUEPRINTS
from comfyui import Server, find_python
from downloads import DOWNLOADS
from graphs import WORKFLOWS

ROOT = Path(__file__).resolve().parents[3]


def test_the_hosts_packages_stay_as_they_are(checkout: Path) -> None:
    """Wrong when requirements.txt asks for something that ComfyUI's own requirements do not bring."""
    command = ["-m", "pip", "install", "--dry-run", "--no-index", "-r", str(ROOT / "requirements.txt")]
    result = subprocess.run([find_python(checkout), *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Would install" not in result.stdout


def test_every_node_is_there_and_explains_itself(server: Server) -> None:
    """Wrong when a node is missing from the menu, or an input has no tooltip."""
    nodes = {name: node for name, node in server.get("/object_info").items() if node["category"] == "LCM Suite"}
    assert {"LCMCheckpointLoader", "LCMApply", "LCMKSampler", "LCMScheduler", "LCMSampler"} <= nodes.keys()
    for name, node in nodes.items():
        assert node["description"], name
        for group in ("required", "optional"):
            for field, (_, options) in node["input"].get(group, {}).items():
                assert options.get("tooltip"), (name, field)
    assert "Cannot import" not in "\n".join(line for line in server.log.read_text().splitlines() if "lcm-suite" in line)


def test_the_examples_are_in_the_template_browser(server: Server) -> None:
    """Wrong when the page does not list one, or cannot fetch its graph or its thumbnail by its name."""
    names = [*WORKFLOWS, *DOWNLOADS]
    assert sorted(server.get("/api/workflow_templates")["lcm-suite"]) == sorted(names)
    for name in names:
        for suffix in (".json", ".jpg"):
            place = urllib.parse.quote(f"/api/workflow_templates/lcm-suite/{name}{suffix}")
            with urllib.request.urlopen(server.url + place, timeout=60) as answer:
                assert answer.status == 200


@pytest.mark.usefixtures("with_blueprints")
def test_the_blueprints_are_listed(server: Server) -> None:
    """Wrong when a host that knows blueprints does not find ours, or finds no subgraph in one."""
    listed = server.get("/global_subgraphs")
    ours = {entry["name"]: key for key, entry in listed.items() if entry["info"]["node_pack"].endswith("lcm-suite")}
    assert sorted(ours) == sorted(BLUEPRINTS)
    for name, key in ours.items():
        [subgraph] = json.loads(server.get(f"/global_subgraphs/{key}")["data"])["definitions"]["subgraphs"]
        assert subgraph["name"] == name
        assert subgraph["nodes"]
