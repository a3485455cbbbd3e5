"""A real ComfyUI for the tests in this folder: one server, on a data folder of its own, for all of them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "workflows"))

from comfyui import Server, make_base  # noqa: E402

if TYPE_CHECKING:
    from browser import Browser, Chromium


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder needs the host."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The ComfyUI to test in."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip("COMFYUI_PATH is not set; set it to a ComfyUI checkout (and COMFYUI_PYTHON to its Python)")
    return Path(path).resolve()


@pytest.fixture(scope="session")
def server(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ComfyUI with this repository as a custom node, as on the first day: nothing is exported."""
    with Server(checkout, make_base(tmp_path_factory.mktemp("comfyui"))) as running:
        yield running


@pytest.fixture(scope="session")
def with_blueprints(checkout: Path) -> None:
    """Leaves a test out where the host is older than blueprints; one that knows them must serve ours."""
    if not (checkout / "app" / "subgraph_manager.py").exists():
        pytest.skip("this ComfyUI knows no blueprints")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """A real browser, for all pages."""
    pytest.importorskip("playwright", reason="playwright is not installed; it drives the browser")
    from browser import launch

    if not (os.environ.get("CHROMIUM") or shutil.which("chromium")):
        pytest.skip("no chromium here; install one or set CHROMIUM")
    with launch() as running:
        yield running


@pytest.fixture(scope="session")
def page(server: Server, chromium: Chromium) -> Iterator[Browser]:
    """ComfyUI's page in a real browser."""
    from browser import Browser

    with Browser(server.url, chromium) as opened:
        yield opened
