"""How much memory LCM Distiller takes in a real ComfyUI (COMFYUI_PATH): measured on a CPU, in a process of its own."""

from __future__ import annotations

from pathlib import Path

from tests.nodes.host_setup import NEEDS_HOST, run_script

pytestmark = NEEDS_HOST


def measure(folder: Path, what: str) -> int:
    """What host_memory.py prints last."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once, and is not counted
    return int(run_script("host_memory.py", folder, what, **at_once).splitlines()[-1])


def test_offloaded_8_bit_weights_take_less_than_a_third_of_plain_training(tmp_path: Path) -> None:
    """500 million random weights: at the peak of a whole run the process's own memory grows by less than a third of
    what the weights in bfloat16 and one plain step with gradients take."""
    (tmp_path / "models" / "loras").mkdir(parents=True)
    count, ours, plain = (measure(tmp_path, what) for what in ("weights", "ours", "plain"))
    print(f"{count / 1e6:.0f} M weights: {ours / 1e6:.0f} MB, plain training {plain / 1e6:.0f} MB")
    assert count > 480e6
    assert plain > 2 * count
    assert ours < plain / 3
