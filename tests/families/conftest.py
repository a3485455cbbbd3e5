"""Tiny models of all flow families, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.flow_models import save_model


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_of(family)`: its diffusers folder."""
    root = tmp_path_factory.mktemp("families")

    def make(family: str) -> Path:
        folder = root / family
        return folder if folder.exists() else save_model(family, folder)

    return make
