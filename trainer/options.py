"""From the configuration's dataclasses to flags and files and back: default < preset < file < flag.

The help texts are the docstrings under the fields. This file loads no other library, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from lcm_core.errors import InputError
from trainer.config import DistillConfig
from trainer.presets import PRESETS

Config = TypeVar("Config")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_SECTION_FLAGS = ("kind", "path")  # fields whose flag is their section's name


@dataclass(frozen=True)
class Option:
    """One field of the configuration."""

    section: str
    """Empty for a field of the configuration itself."""
    name: str
    kind: Any
    """int, float, bool, str or tuple[str, ...]."""
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        name = self.section if self.section and self.name in _SECTION_FLAGS else self.name
        return f"--{name.replace('_', '-')}"

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.section}.{self.name}" if self.section else self.name


def list_options(default: Any = None, section: str = "") -> Iterator[Option]:
    """Every field of the configuration, section after section."""
    default = DistillConfig() if default is None else default
    kinds, texts = get_type_hints(type(default)), field_docs(type(default))
    for field in fields(default):
        value = getattr(default, field.name)
        if is_dataclass(value):
            yield from list_options(value, field.name)
        else:
            yield Option(section, field.name, kinds[field.name], value, texts[field.name])


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, in one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = ast.literal_eval(following.value) if isinstance(following, ast.Expr) else ""
            docs[statement.target.id] = " ".join(text.split())
    return docs


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare `--preset`, `--config` and a flag for every field; the namespace gets those alone that are given."""
    parser.add_argument("--preset", choices=PRESETS, help="settings for a family of teachers; see `presets`")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML or JSON, as a run's config.json")
    groups: dict[str, Any] = {"": parser}
    for option in list_options():
        if option.section not in groups:
            groups[option.section] = parser.add_argument_group(option.section)
        shown = " ".join(option.default) if isinstance(option.default, tuple) else option.default
        help_text = option.help if shown in ("", None) else f"{option.help} (default: {shown})"
        given: dict[str, Any] = {"dest": option.key, "default": argparse.SUPPRESS, "help": help_text.replace("%", "%%")}
        if option.kind is bool:
            given["action"] = argparse.BooleanOptionalAction
        elif option.kind in (int, float, str):
            given |= {"type": option.kind, "metavar": option.kind.__name__.upper()}
        else:
            given |= {"nargs": "*", "type": str, "metavar": "STR"}
        groups[option.section].add_argument(option.flag, **given)


def resolve(args: argparse.Namespace) -> DistillConfig:
    """The configuration that a command line means.

    Raises:
        InputError: the file cannot be read, or names a setting that does not exist or a value of the wrong kind.
    """
    config = DistillConfig()
    if args.preset:
        config = apply(config, PRESETS[args.preset][1], f"preset {args.preset}")
    if args.config:
        config = apply(config, read_settings(args.config), str(args.config))
    flags: dict[str, Any] = {}
    for option in list_options():
        if hasattr(args, option.key):
            place = flags.setdefault(option.section, {}) if option.section else flags
            place[option.name] = getattr(args, option.key)
    return apply(config, flags, "the command line")


def apply(config: Config, settings: Mapping[str, Any], origin: str, section: str = "") -> Config:
    """The configuration with some settings changed.

    Raises:
        InputError: an unknown setting, with the nearest known one, or a value of the wrong kind.
    """
    kinds = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{section}.{name}" if section else str(name)
        if name not in kinds:
            raise InputError(f"{origin}: unknown setting '{key}'{_hint(str(name))}")
        current = getattr(config, name)
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise InputError(f"{origin}: '{key}' must hold settings, such as {key}.{fields(current)[0].name}")
            changes[name] = apply(current, value, origin, key)
        else:
            changes[name] = _convert(value, kinds[name], f"{origin}: {key}")
    return replace(config, **changes)  # type: ignore[type-var]


def read_settings(path: Path) -> dict[str, Any]:
    """A configuration file's content.

    Raises:
        InputError: missing, or neither TOML nor JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else _parse_toml(text)
    except (OSError, ValueError) as error:  # both parsers' errors are ValueErrors
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the settings in {path} ({reason}); give a TOML or JSON file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings; give a TOML or JSON file with sections")
    return content


def to_dict(config: DistillConfig) -> dict[str, Any]:
    """Plain JSON values, as a configuration file has them."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return content


def describe_presets() -> str:
    """Every preset with its settings, as TOML."""
    blocks = []
    for name, (purpose, settings) in PRESETS.items():
        lines = [f"# {name}: {purpose}"]
        sections = {key: value for key, value in settings.items() if isinstance(value, dict)}
        lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items() if key not in sections]
        for section, values in sections.items():
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError as error:  # Python 3.10
        raise InputError("TOML files need Python 3.11; give a JSON file") from error
    return tomllib.loads(text)


def _convert(value: Any, kind: Any, where: str) -> Any:
    if kind not in _WORDS:
        if isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value):
            return tuple(value)
        raise InputError(f"{where} = {value!r} must be a list of texts")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{where} = {value!r} must be {_WORDS[kind]}")
    return value


def _hint(name: str) -> str:
    """What may have been meant, with its section, wherever it is."""
    keys = {option.name: option.key for option in list_options()}
    near = difflib.get_close_matches(name, [*keys, *keys.values()], n=1, cutoff=0.5)
    return f"; did you mean '{keys.get(near[0], near[0])}'?" if near else ""
