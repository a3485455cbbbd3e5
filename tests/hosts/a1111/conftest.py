"""The real web UIs that the tests in this folder run against.

A1111_PATH, FORGE_PATH, NEO_PATH (Forge Neo), REFORGE_PATH and CLASSIC_PATH (Forge Classic) name their checkouts, the
folders that hold launch.py; A1111_PYTHON and so on the Python of each where it is not in the checkout's `venv`. Models,
settings and pictures go elsewhere. Run: `pytest -m host tests/hosts/a1111`. The last two cannot load the embedded
model: see `test_reforge.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for webui_harness: tests are imported one by one, without their folder
from webui_harness import EMOJI, KINDS, WebUI, copy_with_prediction, save_phased_lora


@pytest.fixture(scope="session", params=KINDS)
def webui(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """A running web UI with the embedded model (emoji_lcm, emoji_teacher, their LoRA), `phased`, and `other_*`.

    `other` has the same weights on a card that says epsilon for v_prediction, or v_prediction for epsilon.
    """
    path = os.environ.get(f"{request.param}_PATH")
    if not path:
        pytest.skip(f"{request.param}_PATH is not set to a checkout of the web UI")
    folder = tmp_path_factory.mktemp("webui")
    server = WebUI(request.param, Path(path), folder)
    server.export(EMOJI)
    server.export(copy_with_prediction(folder / "other"))
    save_phased_lora(server.data / "models" / "Lora" / "phased.safetensors")
    try:
        server.start()
        yield server
    finally:
        server.close()
