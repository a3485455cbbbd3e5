"""Texts are UTF-8 on every system: where none is named, Windows takes its own encoding, which lacks most letters."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def unnamed(tree: ast.AST) -> list[int]:
    """The lines that read or write a text file without an encoding."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if _is_text(call) and not any(k.arg == "encoding" for k in call.keywords)]


def _is_text(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute):
        mode = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
        return call.func.attr in ("read_text", "write_text") or (
            call.func.attr == "open" and mode in ("w", "a", "x", "r", "r+")
        )
    mode = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else "r"
    return isinstance(call.func, ast.Name) and call.func.id == "open" and "b" not in str(mode)


@pytest.mark.parametrize("room", ["lcm_core", "trainer", "extension_a1111"])
def test_text_without_an_encoding(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    assert [f"{file.relative_to(ROOT)}:{line}" for file in files for line in unnamed(_parse(file))] == []


def _parse(file: Path) -> ast.AST:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_lines_without_an_encoding_are_seen() -> None:
    good = "open(a, 'rb')\nopen(a, encoding='utf-8')\nb.open('rb')\nread_text(b)\nb.write_text(c, encoding='utf-8')\n"
    bad = "open(a)\nopen(a, 'w')\nb.open('a')\nb.read_text()\nb.write_text(c)\n"
    assert unnamed(ast.parse(good)) == []
    assert unnamed(ast.parse(bad)) == [1, 2, 3, 4, 5]
