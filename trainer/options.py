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
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from lcm_core.errors import InputError
from trainer.config import DistillConfig
from trainer.methods.config import (
    METHOD_CONFIGS,
    MethodConfig,
    check_is_read,
    config_class,
    defaults_of,
    methods_that_read,
)
from trainer.presets import PRESETS
from trainer.toml import read_settings, to_toml

Config = TypeVar("Config")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_SECTION_FLAGS = ("kind", "path")  # fields whose flag is their section's name
_OTHER_FLAGS = {"learning_rate": ("--lr",)}  # what other trainers call them


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
    """Every field of the configuration, section after section; of the methods, those of all of them."""
    default = DistillConfig() if default is None else default
    if isinstance(default, MethodConfig):
        yield from _method_options(section)
        return
    kinds, texts = get_type_hints(type(default)), field_docs(type(default))
    for field in fields(default):
        value = getattr(default, field.name)
        if is_dataclass(value):
            yield from list_options(value, field.name)
        else:
            yield Option(section, field.name, kinds[field.name], value, texts[field.name])


def _method_options(section: str) -> Iterator[Option]:
    """The settings of all methods, each once, with the methods that read it."""
    found: dict[str, Option] = {}
    for config in METHOD_CONFIGS.values():
        kinds, texts = get_type_hints(config), field_docs(config)
        for field in fields(config):
            readers = methods_that_read(field.name)
            only = f"{', '.join(readers)}: " if 0 < len(readers) < len(METHOD_CONFIGS) else ""
            text = only + texts[field.name]
            found.setdefault(field.name, Option(section, field.name, kinds[field.name], field.default, text))
    yield from found.values()


def field_docs(cls: type) -> Mapping[str, str]:
    """The docstring under each field of a dataclass and of those that it extends, in one line."""
    found: Any = cls  # a type checker does not see that classes can be keys of a cache
    return _field_docs(found)


@cache
def _field_docs(cls: Any) -> Mapping[str, str]:
    docs: dict[str, str] = {}
    parts: list[Any] = [part for part in cls.__mro__ if is_dataclass(part)]
    for part in reversed(parts):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = ast.literal_eval(following.value) if isinstance(following, ast.Expr) else ""
                docs[statement.target.id] = " ".join(text.split()) or docs.get(statement.target.id, "")
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
        groups[option.section].add_argument(option.flag, *_OTHER_FLAGS.get(option.name, ()), **given)


def resolve(args: argparse.Namespace, usual: Mapping[str, Any] | None = None) -> DistillConfig:
    """The configuration that a command line means; everything said goes before `usual`, the command's own settings.

    Raises:
        InputError: the file cannot be read, or names a setting that does not exist or that the method does not read, or
            a value of the wrong kind or out of its range.
    """
    preset = PRESETS[args.preset][1] if args.preset else {}
    stated = read_settings(args.config) if args.config else {}
    flags: dict[str, Any] = {}
    for option in list_options():
        if hasattr(args, option.key):
            place = flags.setdefault(option.section, {}) if option.section else flags
            place[option.name] = getattr(args, option.key)
    config = DistillConfig()
    kind = _stated_kind(flags) or _stated_kind(stated) or _stated_kind(preset) or _stated_kind(usual or {})
    if kind is not None:
        config = replace(config, method=config_class(kind)())
    layers = [
        (usual or {}, "the command's own settings"),
        (preset, f"preset {args.preset}"),
        (_without_unread(stated, config.method), str(args.config)),
        (flags, "the command line"),
    ]
    changes: dict[str, Any] = {}
    for settings, origin in layers:  # all before any value is checked: two that belong together may stand apart
        changes = _merged(changes, _read(config, settings, origin))
    return _changed(config, changes)


def apply(config: Config, settings: Mapping[str, Any], origin: str) -> Config:
    """The configuration with some settings changed.

    Raises:
        InputError: an unknown setting, with the nearest known one, one that the method does not read, or a value of the
            wrong kind or out of its range.
    """
    kind = _stated_kind(settings)
    if kind is not None and isinstance(config, DistillConfig):
        config = replace(config, method=_as_kind(config.method, config_class(kind), origin))
    return _changed(config, _read(config, settings, origin))


def _stated_kind(settings: Mapping[str, Any]) -> str | None:
    """The method that settings name, if they do."""
    method = settings.get("method")
    kind = method.get("kind") if isinstance(method, Mapping) else None
    return kind if isinstance(kind, str) else None


def _without_unread(settings: dict[str, Any], method: MethodConfig) -> dict[str, Any]:
    """A file's settings without those that the method does not read and that have their default values. A run's file
    lists all that its own method reads, and the command line may choose another method."""
    stated = settings.get("method")
    if not isinstance(stated, Mapping):
        return settings
    kinds = [*reversed(METHOD_CONFIGS.values()), METHOD_CONFIGS.get(str(stated.get("kind")), MethodConfig)]
    usual = {name: value for config in kinds for name, value in defaults_of(config).items()}
    own = defaults_of(type(method)).keys() | {"kind"}
    kept = {key: value for key, value in stated.items() if key in own or key not in usual or value != usual[key]}
    return {**settings, "method": kept}


def _as_kind(method: MethodConfig, kind: type[MethodConfig], origin: str) -> MethodConfig:
    """The settings of another method that both read; the others must not have been changed."""
    own = defaults_of(type(method))
    values = {name: getattr(method, name) for name in own if getattr(method, name) != own[name]}
    for name in values:
        check_is_read(kind, name, f"{origin}: ")
    return kind(**values)


def _read(config: Any, settings: Mapping[str, Any], origin: str, section: str = "") -> dict[str, Any]:
    """Settings by the names and of the kinds that a configuration has, as a dict of dicts."""
    kinds = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{section}.{name}" if section else str(name)
        if name not in kinds:
            if isinstance(config, MethodConfig):
                check_is_read(type(config), str(name), f"{origin}: ")
            raise InputError(f"{origin}: unknown setting '{key}'{_hint(str(name))}")
        current = getattr(config, name)
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise InputError(f"{origin}: '{key}' must hold settings, such as {key}.{fields(current)[0].name}")
            changes[name] = _read(current, value, origin, key)
        else:
            changes[name] = _convert(value, kinds[name], f"{origin}: {key}")
    return changes


def _merged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of which the later win, section by section."""
    both = {
        name: _merged(before[name], value)
        for name, value in after.items()
        if isinstance(value, dict) and name in before
    }
    return {**before, **after, **both}


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration with what `_read` has read. Its method is of the kind that was read already."""
    values = {
        name: _changed(getattr(config, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
        if not (isinstance(config, MethodConfig) and name == "kind")
    }
    return replace(config, **values)


def to_dict(config: DistillConfig) -> dict[str, Any]:
    """Plain JSON values, as a configuration file has them."""
    return dict(json.loads(json.dumps(asdict(config))))


def describe_presets() -> str:
    """Every preset with its settings, as TOML."""
    blocks = [f"# {name}: {purpose}\n{to_toml(settings)}" for name, (purpose, settings) in PRESETS.items()]
    return "\n".join(blocks).rstrip("\n")


def describe_run(config: DistillConfig) -> str:
    """All settings of a run as a file for `--config`, each with what it is for."""
    head = "# What this run was started with; the same again: python -m trainer distill --config run.toml\n\n"
    return head + to_toml(to_dict(config), {option.key: option.help for option in list_options()})


def _convert(value: Any, kind: Any, where: str) -> Any:
    if kind not in _WORDS:
        if isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value):
            return tuple(value)
        raise InputError(f"{where} = {value!r} must be a list of texts")
    if kind is float and type(value) is int:
        if abs(value) > 1e308:
            raise InputError(f"{where} is too large; use a smaller number")
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{where} = {value!r} must be {_WORDS[kind]}")
    return value


def _hint(name: str) -> str:
    """What may have been meant, with its section, wherever it is."""
    keys = {option.name: option.key for option in list_options()}
    near = difflib.get_close_matches(name, [*keys, *keys.values()], n=1, cutoff=0.5)
    return f"; did you mean '{keys.get(near[0], near[0])}'?" if near else ""
