"""Settings as TOML, to be read by people: what a preset sets, and what a run was started with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def toml_value(value: Any) -> str:
    """A text, number, truth value, or list of them."""
    # JSON's own, but for pairs of \u escapes, which TOML does not know, and the one control character that JSON allows
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def to_toml(settings: Mapping[str, Any], comments: Mapping[str, str] | None = None) -> str:
    """Settings and their sections.

    Args:
        settings: values by name; a mapping is a section.
        comments: what a setting is for, by its name or `section.name`.
    """
    said = comments or {}
    sections = {key: value for key, value in settings.items() if isinstance(value, Mapping)}
    blocks = [_lines({key: value for key, value in settings.items() if key not in sections}, said, "")]
    for name, section in sections.items():
        blocks.append(f"[{name}]\n" + _lines(section, said, f"{name}."))
    return ("\n" if said else "").join(block for block in blocks if block)


def _lines(values: Mapping[str, Any], comments: Mapping[str, str], prefix: str) -> str:
    return "".join(
        (f"# {text}\n" if (text := comments.get(prefix + name)) else "") + f"{name} = {toml_value(value)}\n"
        for name, value in values.items()
    )
