"""One worker for all tests here, and tiny models in every layout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lcm_core
from tests.core.conftest import models
from tests.fuzz.guards import Worker
from tests.fuzz.weights import QUICK

__all__ = ["models", "tiny_models", "worker"]
collect_ignore = [] if sys.platform == "linux" else ["test_inputs.py", "test_known.py"]
"""Forks and /proc; what is found there is no different on other systems."""


@pytest.fixture(scope="session")
def tiny_models(models: Path) -> Path:
    """`plain`, `lcm` and `emoji`, which are folders, and `plain.safetensors`."""
    from lcm_core.__main__ import main

    file = models / "plain.safetensors"
    if not file.exists():
        assert main(["export", "--to", "single-file", "--model", str(models / "plain"), "--path", str(file)]) == 0
    return models


@pytest.fixture(scope="session")
def worker(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Everything that a command line runs through has been imported there."""
    started = Worker(tmp_path_factory.mktemp("fuzz"), Path(lcm_core.__file__).parents[1])
    model, lora = str(tiny_models / "plain"), str(tiny_models / "emoji/lora/lcm_lora.safetensors")
    started.warm("lcm_core.__main__", ["generate", "a cat", "--model", model, "--lora", lora, *QUICK])
    started.warm("lcm_core.__main__", ["info", str(tiny_models / "plain.safetensors")])
    yield started
    started.close()


def pytest_collection_modifyitems(items: list) -> None:  # type: ignore[type-arg]
    """Forked command lines under guard take minutes; one of them still fails and is to be found first."""
    import pytest

    for item in items:
        if "tests/fuzz" in str(item.path).replace("\\", "/"):
            item.add_marker(pytest.mark.slow)
