"""One worker for all tests here, and tiny models in every layout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.core.conftest import make_models
from tests.fuzz.guards import Worker
from tests.fuzz.kinds import add_files, start_worker

collect_ignore = [] if sys.platform == "linux" else ["test_inputs.py", "test_known.py", "test_worker.py"]
"""Forks and /proc; what is found there is no different on other systems."""


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain`, `lcm` and `emoji`, which are folders, `plain.safetensors`, and `parts` of other kinds."""
    return add_files(make_models(tmp_path_factory.mktemp("models"), least=True))


@pytest.fixture(scope="session")
def worker(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Everything that a command line runs through has been imported there."""
    with closing(start_worker(tmp_path_factory.mktemp("fuzz"), tiny_models)) as started:
        yield started
