"""Stand-ins for what a web UI's Python has and this one has not: its `modules` package and gradio."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

import extension_a1111

_NAMES = ("errors", "extra_networks", "paths", "processing", "prompt_parser", "rng", "script_callbacks", "scripts")
_NAMES += ("sd_models", "sd_samplers", "sd_samplers_common", "sd_schedulers", "shared")
_OURS = ("host", "advice")


class SamplerData(NamedTuple):
    """As in the web UI."""

    name: str
    constructor: Any
    aliases: list[str]
    options: dict[str, Any]


class Fake(SimpleNamespace):
    """The parts of a web UI by their names, and what loads code of ours that imports them."""

    def load(self, name: str) -> Any:
        return importlib.import_module(name)

    def load_script(self, name: str) -> Any:
        """One of `extension_a1111/scripts`, by its path as the web UI does it."""
        file = Path(extension_a1111.__file__).parent / "scripts" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


@pytest.fixture
def fake_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A web UI without a model. What it leaves in the module table is taken out again."""
    package = ModuleType("modules")
    parts = {name: ModuleType(f"modules.{name}") for name in _NAMES}
    monkeypatch.setitem(sys.modules, "modules", package)
    for name, part in parts.items():
        setattr(package, name, part)
        monkeypatch.setitem(sys.modules, f"modules.{name}", part)
    found: Any = Fake(**parts)
    found.shared.opts = SimpleNamespace(data={}, localization="None")
    found.shared.cmd_opts = SimpleNamespace()
    found.shared.sd_model = SimpleNamespace(sd_checkpoint_info=SimpleNamespace(filename="model.safetensors"))
    found.sd_samplers_common.SamplerData = SamplerData
    found.sd_samplers.all_samplers = []
    found.sd_samplers.all_samplers_map = {}
    found.sd_samplers.set_samplers = lambda: None
    _forget()
    yield found
    _forget()


def _forget() -> None:
    """Our modules that know a host: the next test has another."""
    for name in _OURS:
        sys.modules.pop(f"extension_a1111.{name}", None)
        vars(extension_a1111).pop(name, None)
