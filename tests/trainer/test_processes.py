"""Several processes: one result, whatever their number, whatever becomes of one of them."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lcm_core.files.safetensors import read_safetensors

HERE = Path(__file__).parent


def launch(folder, steps, count, accumulation, kind="lcd", killed_at=None, sharded=""):
    """Exit codes of `count` processes that distil a small network."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import shared_work; shared_work.main(*sys.argv[2:])"
    more = {} if killed_at is None else {"KILLED_AT": str(killed_at)}
    return start([sys.executable, "-c", code, HERE, folder, steps, accumulation, kind, sharded], count, **more)


def start(command, count, **more):
    """Exit codes of `count` processes that talk by gloo, as `accelerate launch` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"} | more
    workers = [
        subprocess.Popen([*map(str, command)], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    end = time.monotonic() + 400
    try:
        while any(worker.poll() is None for worker in workers) and time.monotonic() < end:
            time.sleep(0.1)
            if any(worker.poll() for worker in workers):  # the others are told by their connection, or by the launcher
                end = min(end, time.monotonic() + 10)
        for worker in workers:
            worker.terminate()
        return [worker.wait(timeout=30) for worker in workers]
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lcd", "dmd2", "full"])
def test_two_processes_with_a_half_of_the_weights_each_learn_what_one_learns(tmp_path, kind):
    """FSDP2. The norm of all gradients is added up in another order, so that it is not bit for bit."""
    assert launch(tmp_path / "one", 5, 1, 2, kind) == [0]
    assert launch(tmp_path / "two", 5, 2, 1, kind, sharded="yes") == [0, 0]
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    assert one[1] == two[1] == "5"
    torch.testing.assert_close(two[0], one[0], rtol=1e-4, atol=1e-6)
    losses = [read_safetensors(tmp_path / name / "state.safetensors")[0]["log"][:, 1] for name in ("one", "two")]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_run_with_shared_out_weights_goes_on_with_other_numbers_of_processes(tmp_path):
    """Killed and continued as never stopped, bit for bit; two, one, two as one."""
    assert launch(tmp_path / "one", 6, 1, 2) == [0]
    assert launch(tmp_path / "two", 6, 2, 1, sharded="yes") == [0, 0]
    first = launch(tmp_path / "killed", 6, 2, 1, killed_at=2, sharded="yes")
    assert first[1] == -9
    assert first[0] != 0
    assert state(tmp_path / "killed")[1] == "2"
    assert launch(tmp_path / "killed", 6, 2, 1, sharded="yes") == [0, 0]
    torch.testing.assert_close(state(tmp_path / "killed")[0], state(tmp_path / "two")[0], rtol=0, atol=0)
    for steps, count in ((2, 2), (4, 1), (6, 2)):
        assert launch(tmp_path / "many", steps, count, 2 // count, sharded="yes") == [0] * count
    torch.testing.assert_close(state(tmp_path / "many")[0], state(tmp_path / "one")[0], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("student", "file"), [("lora", "mine_lora.safetensors"), ("full", "mine.safetensors")])
def test_a_whole_run_with_shared_out_weights_leaves_what_one_process_leaves(teachers, photos, tmp_path, student, file):
    words = ["-m", "trainer", "distill", "--teacher", teachers(), "--data", photos, "--device", "cpu", "--name", "mine"]
    words += ["--student", student, "--steps", 2, "--batch-size", 4, "--warmup-steps", 1, "--learning-rate", 1e-3]
    words += ["--rank", 2, "--samples", 0, "--preview-every", 0, "--cache", tmp_path / "cache", "--sharded"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert start([sys.executable, *words, "--output", one, "--accumulation", 2], 1) == [0]
    assert start([sys.executable, *words, "--output", two], 2) == [0, 0]
    found, expected = (read_safetensors(folder / file)[0] for folder in (two, one))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
