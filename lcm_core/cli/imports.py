"""A quicker start of the command line: what diffusers and transformers import on the way, and no command uses, is not.

Only for a process of our own: elsewhere others may want what is left out here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from threading import RLock
from types import ModuleType
from typing import Any

_UNUSED = ("peft", "sklearn")
"""Packages that these libraries work without, and import where they are installed."""
_WHOLE = (
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "scipy.stats",  # seconds, for a scheduler's option
)
"""Packages that import much more than what is asked of them, or are imported for what nobody asks."""


def leave_out_unused() -> None:
    """Let this process do without what no command uses; what has been imported before stays."""
    for name in _UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # as where it is not installed
    sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the packages of `_WHOLE`, and has them wait."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name not in _WHOLE:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """Makes a package that runs its `__init__.py` when it is first asked for a name that is none of its modules'."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Waiting(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet."""


class _Waiting(ModuleType):
    _lock = RLock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        with self._lock:
            if self.__class__ is _Waiting:
                self.__class__ = ModuleType  # type: ignore[assignment]
                self.__spec__.loader = self.__loader__ = self.__spec__.loader.loader  # type: ignore
                self.__loader__.exec_module(self)  # type: ignore
        return getattr(self, name)
