"""Settings in files: read from TOML or JSON, and written as TOML for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError
from lcm_core.files.reading import read_json, read_text


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


def read_settings(path: Path) -> dict[str, Any]:
    """A configuration file's content.

    Raises:
        InputError: missing, or neither TOML nor JSON.
    """
    if path.suffix == ".json":
        return read_json(path)
    text = read_text(path)
    try:
        return _parse_toml(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot read the settings in {path} ({error}); give a TOML or JSON file") from error


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError as error:  # Python 3.10
        raise InputError("TOML files need Python 3.11; give a JSON file") from error
    return tomllib.loads(text)
