"""What LCM Suite adds to the start of a real ComfyUI (COMFYUI_PATH)."""

from __future__ import annotations

from pathlib import Path

from tests.nodes.host_setup import NEEDS_HOST, run_script

pytestmark = NEEDS_HOST


def test_the_suite_loads_in_less_than_300_ms(tmp_path: Path) -> None:
    """Of CPU, in the better of two starts: the trainer and all that only runs need is imported when it is needed."""
    seconds = [float(run_script("host_startup.py", tmp_path).splitlines()[-1]) for _ in range(2)]
    print("seconds of CPU:", seconds)
    assert min(seconds) < 0.3
