"""How much memory LCM Distiller takes in a real ComfyUI (COMFYUI_PATH): measured on a CPU, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.nodes.host_setup import CHECKOUT, NEEDS_HOST, find_host_python

pytestmark = NEEDS_HOST


def test_offloaded_8_bit_weights_take_less_than_a_third_of_plain_training(tmp_path: Path) -> None:
    """500 million random weights: at the peak of a whole run the process's own memory grows by less than a third of
    what the weights in bfloat16 and one plain step with gradients take."""
    (tmp_path / "models" / "loras").mkdir(parents=True)
    command = [find_host_python(), str(Path(__file__).with_name("host_memory.py")), str(CHECKOUT), str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 480e6
    assert found["plain"] > 2 * found["weights"]
    assert found["ours"] < found["plain"] / 3
