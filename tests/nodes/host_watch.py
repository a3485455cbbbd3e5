"""Which of a host's functions and classes are no longer those that it came with."""

from __future__ import annotations

import sys
from collections.abc import Iterator

HOST = {
    *("app", "comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview"),
    *("node_helpers", "nodes", "server", "utils"),
}
_METHODS = (property, classmethod, staticmethod)


def functions() -> dict[str, object]:
    """All functions, classes and methods of the host's loaded modules, by name."""
    return dict(_functions())


def replaced(before: dict[str, object]) -> list[str]:
    """Names that stand for something else now, or for nothing."""
    now = functions()
    return [name for name, value in before.items() if now.get(name) is not value]


def _functions() -> Iterator[tuple[str, object]]:
    for module, loaded in list(sys.modules.items()):
        if module.partition(".")[0] not in HOST:
            continue
        for name, value in list(vars(loaded).items()):
            if callable(value):
                yield f"{module}.{name}", value
            if isinstance(value, type) and value.__module__ == module:
                yield from _methods(f"{module}.{name}", value)


def _methods(place: str, kind: type) -> Iterator[tuple[str, object]]:
    for name, value in vars(kind).items():
        if callable(value) or isinstance(value, _METHODS):
            yield f"{place}.{name}", value
