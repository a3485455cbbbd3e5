"""States that are damaged, left behind, or of a run with too high a learning rate."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from trainer.state import Log, State

from .test_loop import CONFIG, _losses, _run, _weights

HALF = replace(CONFIG, steps=6, cooldown=0.0)
WHOLE = replace(CONFIG, cooldown=0.0)


def _flip(file, place=-5):
    content = bytearray(file.read_bytes())
    content[place] ^= 16
    file.write_bytes(content)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize("spoil", [_flip, _cut, lambda file: _flip(file, 8), Path.unlink])
def test_a_damaged_state_is_named_and_the_one_before_is_gone_on_from(tmp_path, spoil):
    """One flipped bit anywhere, a file cut short, or none: never trained on, and the result is the same bit for bit."""
    whole = _run(tmp_path / "whole", WHOLE)
    _run(tmp_path / "parts", HALF)
    assert read_safetensors(tmp_path / "parts/state-earlier.safetensors")[1]["step"] == "5"
    spoil(tmp_path / "parts/state.safetensors")
    with pytest.warns(UserWarning, match=r"parts/state.safetensors.*goes on from .*state-earlier.safetensors"):
        parts = _run(tmp_path / "parts", WHOLE)
    torch.testing.assert_close(_weights(*parts), _weights(*whole), rtol=0, atol=0)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")


def test_moments_come_back_in_their_parameters_memory_layout(tmp_path):
    """On CUDA, fused AdamW refuses moments that are laid out otherwise, so that no channels-last run could go on."""
    network = torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    parameters = dict(network.named_parameters())

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW(network.parameters())

    first, again = optimizer(), optimizer()
    network(torch.randn(1, 4, 5, 5)).sum().backward()
    first.step()
    saved = State(tmp_path, parameters, first, None)
    saved.record(Log(0, 0.0, 0.0, 0.0, 0))
    saved.save()
    State(tmp_path, parameters, again, None).load()
    for parameter in parameters.values():
        for field in ("exp_avg", "exp_avg_sq"):
            expected, loaded = first.state[parameter][field], again.state[parameter][field]
            assert loaded.stride() == parameter.stride()
            torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


def test_a_damaged_state_does_not_take_the_place_of_the_good_one_before(tmp_path):
    _run(tmp_path, HALF)
    _flip(tmp_path / "state.safetensors")
    with pytest.warns(UserWarning, match="state-earlier"):
        _run(tmp_path, replace(HALF, save_every=1e9))  # one step, saved once
    _cut(tmp_path / "state.safetensors")
    with pytest.warns(UserWarning, match="state-earlier"):
        _run(tmp_path, HALF)


def test_two_damaged_states_are_refused_with_the_way_on(tmp_path):
    _run(tmp_path, HALF)
    for name in ("state.safetensors", "state-earlier.safetensors"):
        _flip(tmp_path / name)
    with pytest.raises(InputError, match=r"no state of this run can be used: .*state.safetensors is damaged.*delete"):
        _run(tmp_path, WHOLE)


def test_after_a_loss_that_is_not_finite_a_smaller_learning_rate_goes_on(tmp_path):
    with pytest.raises(InputError, match=r"nan at step 7.*--learning-rate, and the same command goes on from there"):
        _run(tmp_path, poison_at=7)
    _run(tmp_path, replace(CONFIG, learning_rate=1e-3))
    rates = read_safetensors(tmp_path / "state.safetensors")[0]["log"][:, 2]
    assert len(rates) == CONFIG.steps
    assert float(rates[7]) == pytest.approx(float(rates[6]) / 10)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_what_a_kill_in_the_middle_of_writing_leaves_is_gone_after_the_next_start(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal, sys
            from pathlib import Path
            import lcm_core.files.safetensors
            from trainer.state import State, keep_copy
            sys.path.insert(0, sys.argv[2])
            import test_loop

            def die(tensors, path, metadata):
                Path(path).write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)

            lcm_core.files.safetensors.save_file = die
            test_loop._run(Path(sys.argv[1]))
            """
        )
    )
    here, folder = Path(__file__).parent, tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(here.parents[1])}
    command = [sys.executable, str(script), str(folder), str(here)]
    assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert [file.name[:7] for file in folder.iterdir() if file.suffix == ".safetensors"] == [".state."]
    _run(folder)
    assert sorted(file.name for file in folder.iterdir() if not file.is_dir()) == [
        "log.jsonl",
        "state-earlier.safetensors",
        "state.safetensors",
    ]
