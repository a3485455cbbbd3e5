"""The documentation's notebook: it names what exists, and its cells run from top to bottom."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lcm_core.pipeline.image import save_image
from trainer.cli.main import build_parser

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "distil_emoji.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_its_imports_exist_and_are_public() -> None:
    """A renamed function would break a reader's first cell."""
    nodes = [node for cell in code_cells() for node in ast.walk(ast.parse(cell))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {str(node.module).partition(".")[0] for node in imports} >= {"lcm_core", "trainer"}
    for node in imports:
        for alias in node.names:
            assert hasattr(importlib.import_module(str(node.module)), alias.name), alias.name
    named = [str(node.module) for node in imports] + [alias.name for node in imports for alias in node.names]
    named += [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    assert not [name for name in named if any(part.startswith("_") for part in name.split("."))]


def test_its_command_is_one_that_the_trainer_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A renamed option would end the training cell."""
    commands: list[list[str]] = []
    monkeypatch.setattr("trainer.cli.main.main", lambda argv: commands.append(argv) or 0)
    settings, train, _ = code_cells()
    exec(f"{settings}\n{train}", {})
    assert len(commands) == 1
    args = build_parser().parse_args(commands[0])
    assert callable(args.run)


@pytest.mark.slow
def test_it_distils_and_shows_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would run it, with two drawings, two training steps and pictures of two steps and three."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("pizza", "orange"), ("apple", "red")):
        save_image(Image.new("RGB", (64, 64), colour), tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(f"a {name}")
    changed = {"DATA": "data", "STEPS": 2, "BATCH_SIZE": 2, "TEACHER_STEPS": 3, "STUDENT_STEPS": 2}
    settings, *cells = code_cells()
    names: dict[str, Any] = {}
    exec(settings, names)
    assert changed.keys() <= names.keys()
    names |= changed
    for cell in cells:
        exec(cell, names)
    assert (tmp_path / "my-lcm" / "my-lcm_lora.safetensors").is_file()
    assert {label: len(images) for label, images in names["columns"].items()} == {
        "teacher, 3 steps": 2,
        "teacher, 2 steps": 2,
        "LCM-LoRA, 2 steps": 2,
    }
    assert names["grid"].width > 3 * names["columns"]["LCM-LoRA, 2 steps"][0].width
