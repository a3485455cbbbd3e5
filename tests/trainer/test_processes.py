"""Several processes: one result, whatever their number, whatever becomes of one of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcm_core.files.safetensors import read_safetensors

HERE = Path(__file__).parent


def launch(folder, steps, count, accumulation, kind="lcd", killed_at=None):
    """Exit codes of `count` processes that talk by gloo, as `accelerate launch` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; sys.path.insert(0, sys.argv[1]); import shared_work; shared_work.main(*sys.argv[2:])"
    command = [sys.executable, "-c", code, HERE, folder, steps, accumulation, kind]
    common = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    if killed_at is not None:
        common["KILLED_AT"] = str(killed_at)
    workers = [
        subprocess.Popen([*map(str, command)], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    try:
        return [worker.wait(timeout=200) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


def state(folder):
    """All that was learnt; the log is of seconds and of losses that are added up in another order."""
    tensors, about = read_safetensors(folder / "state.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name != "log"}, about["step"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lcd", "dmd2"])
def test_two_processes_learn_bit_for_bit_what_one_learns_in_two_parts(tmp_path, kind):
    """Of dmd2 the student rests in every second step, in which its parameters get no gradient."""
    assert launch(tmp_path / "one", 5, 1, 2, kind) == [0]
    assert launch(tmp_path / "two", 5, 2, 1, kind) == [0, 0]
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one[1] == two[1] == "5"
    torch.testing.assert_close(two[0], one[0], rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_goes_on_when_one_process_was_killed_and_with_other_numbers_of_them(tmp_path):
    """Two, of which one is killed; two again; one; two: as one that was never stopped, bit for bit."""
    assert launch(tmp_path / "one", 6, 1, 2) == [0]
    first = launch(tmp_path / "many", 6, 2, 1, killed_at=2)
    assert first[1] == -9
    assert first[0] != 0  # the other is told by its connection, and ends
    assert state(tmp_path / "many")[1] == "2"
    for steps, count in ((3, 2), (4, 1), (6, 2)):
        assert launch(tmp_path / "many", steps, count, 2 // count) == [0] * count
    torch.testing.assert_close(state(tmp_path / "many")[0], state(tmp_path / "one")[0], rtol=0, atol=0)
