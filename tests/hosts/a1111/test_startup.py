"""The web UI's start with the extension and without it: as fast, and as quiet."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from webui_harness import WebUI

pytestmark = pytest.mark.host
_LOADING = re.compile(r"Startup time: .*?load scripts: ([\d.]+)s")
_MORE = 2.0  # seconds that loading the extension may take on a busy machine


def start(webui: WebUI, folder: Path, with_extension: bool) -> str:
    """What such a web UI prints while it starts, from the same checkout and with the same models."""
    server = WebUI(webui.kind, webui.checkout, folder, with_extension)
    (folder / "models").symlink_to(webui.data / "models", target_is_directory=True)
    try:
        server.start()
        return server.read_log()
    finally:
        server.close()


def lines_of(log: str, folder: Path) -> set[str]:
    """The lines of a start without numbers, paths and models: Neo begins with any, as it has them in a set."""
    shown = log[: log.index("Startup time:")].replace(str(folder), "")
    return {re.sub(r"\w+\.safetensors|[\d.,:]+|0x[0-9a-f]+", "#", line) for line in shown.splitlines()}


def test_the_start_is_as_fast_and_as_quiet_as_without_us(webui: WebUI, tmp_path: Path) -> None:
    logs = {name: start(webui, tmp_path / name, name == "with") for name in ("without", "with")}
    times = {name: float((_LOADING.search(log) or [0, "0"])[1]) for name, log in logs.items()}
    print("seconds to load scripts:", times)
    assert times["with"] - times["without"] < _MORE
    shown = {name: lines_of(log, tmp_path / name) for name, log in logs.items()}
    assert shown["with"] - shown["without"] == set()
