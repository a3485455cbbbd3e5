"""A server over a tiny random model, in this process and in one of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lcm_core.pipeline import Pipeline
from lcm_core.serve.app import build_app
from lcm_core.serve.painter import Painter
from lcm_core.serve.service import Service
from lcm_core.serve.shelf import Shelf, find_models

ROOT = Path(__file__).parents[2]
sys.path.append(str(Path(__file__).parent))  # for serving: tests are imported one by one, without their folder


@pytest.fixture(scope="session")
def shelf() -> Shelf:
    """The embedded model and its teacher."""

    def load(path: str, **options: Any) -> Pipeline:
        return Pipeline.load(path, device="cpu", dtype="float32", **options)

    return Shelf(find_models("emoji", None), {}, load)


@pytest.fixture
def service(shelf: Shelf) -> Iterator[Service]:
    from serving import LIMITS

    shelf.usual = "emoji"
    running = Service(shelf, Painter(shelf, LIMITS.waiting), LIMITS)
    yield running
    running.painter.close()


@pytest.fixture
def client(service: Service) -> Iterator[Any]:
    testclient = pytest.importorskip("starlette.testclient", reason="needs the extra serve")
    with testclient.TestClient(build_app(service), base_url="http://127.0.0.1:7000") as opened:
        yield opened


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`python -m lcm_core serve` in a process of its own; its address. It has to end with clients that hang on it."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    from serving import end, hanging_clients, start

    command = [sys.executable, "-m", "lcm_core", "serve", "--no-browser", "--device", "cpu", "--max-waiting", "16"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    output = tmp_path_factory.mktemp("server") / "output.txt"
    process, address = start(command, output, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})
    try:
        yield address
        assert process.poll() is None, f"the server died: {output.read_text()}"
        with hanging_clients(int(address.rpartition(":")[2])):
            end(process)
        assert "Traceback" not in output.read_text(), output.read_text()
    finally:
        process.kill()
        process.wait(10)
