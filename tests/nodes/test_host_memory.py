"""How much memory LCM Distiller takes in a real ComfyUI (COMFYUI_PATH): measured on a CPU, in a process of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.nodes.host_setup import CHECKOUT, NEEDS_HOST, find_host_python

pytestmark = NEEDS_HOST


def measure(folder: Path, what: str) -> int:
    """What host_memory.py prints."""
    command = [find_host_python(), str(Path(__file__).with_name("host_memory.py")), str(CHECKOUT), str(folder), what]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once, and is not counted
    done = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.splitlines()[-1])


def test_offloaded_8_bit_weights_take_less_than_a_third_of_plain_training(tmp_path: Path) -> None:
    """500 million random weights: at the peak of a whole run the process's own memory grows by less than a third of
    what the weights in bfloat16 and one plain step with gradients take."""
    (tmp_path / "models" / "loras").mkdir(parents=True)
    count, ours, plain = (measure(tmp_path, what) for what in ("weights", "ours", "plain"))
    assert count > 480e6
    assert plain > 2 * count
    assert ours < plain / 3
