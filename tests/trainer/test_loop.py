"""The training loop: a stopped run must end where an uninterrupted one ends, bit for bit."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lcm_core.errors import InputError
from lcm_core.weights import read_safetensors
from trainer.loop import LoopConfig, learning_rate_at, step_generator, train

CONFIG = LoopConfig(steps=12, batch_size=4, learning_rate=1e-2, warmup_steps=3, save_every=0.0, seed=5)


def _run(folder, config=CONFIG, stop_at=None, poison_at=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    ema = copy.deepcopy(model).requires_grad_(False)

    def loss_fn(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(config.batch_size, 3, generator=generator)
        loss = (model(x) - x.flip(1)).square().mean()
        return loss * float("nan") if step == poison_at else loss

    train(model, loss_fn, config, folder, ema)
    return model, ema


def _weights(*modules):
    return [p for module in modules for p in module.parameters()]


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, stop_at):
    whole = _run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "parts", stop_at=stop_at)
    parts = _run(tmp_path / "parts")
    torch.testing.assert_close(_weights(*parts), _weights(*whole), rtol=0, atol=0)
    assert (tmp_path / "parts/log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()


def test_a_finished_run_is_only_read_again(tmp_path):
    first = _run(tmp_path)
    again = _run(tmp_path, stop_at=0)  # would raise if a step were run
    torch.testing.assert_close(_weights(*again), _weights(*first), rtol=0, atol=0)


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1])
def test_a_killed_process_continues_bit_for_bit(tmp_path, delay):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            from dataclasses import replace
            from pathlib import Path
            sys.path.insert(0, sys.argv[2])
            import test_loop
            test_loop._run(Path(sys.argv[1]), replace(test_loop.CONFIG, steps=60))
            """
        )
    )
    here, folder = os.path.dirname(__file__), tmp_path / "parts"
    command = [sys.executable, str(script), str(folder), here]
    environment = {**os.environ, "PYTHONPATH": str(Path(here).parents[1])}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    while not (folder / "state.safetensors").exists():
        assert process.poll() is None, "the run ended before it saved anything"
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    read_safetensors(folder / "state.safetensors")  # whole, though the process died at any moment
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=environment)
    whole = _run(tmp_path / "whole", replace(CONFIG, steps=60))
    state = read_safetensors(folder / "state.safetensors")[0]
    for prefix, module in zip(("online", "ema"), whole, strict=True):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(state[f"{prefix}.{name}"], parameter.detach(), rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    with pytest.raises(InputError, match=r"nan at step 7.*learning rate"):
        _run(tmp_path, poison_at=7)
    tensors, metadata = read_safetensors(tmp_path / "state.safetensors")
    assert metadata["step"] == "7"
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_the_state_of_another_network_is_refused(tmp_path):
    _run(tmp_path)
    other = nn.Linear(2, 2)
    with pytest.raises(InputError, match="other networks"):
        train(other, lambda step, generator: other.weight.sum(), CONFIG, tmp_path)


def test_every_step_has_its_own_noise_and_the_same_in_every_run():
    draws = [torch.randn(4, generator=step_generator(3, step)) for step in (0, 1, 0)]
    torch.testing.assert_close(draws[0], draws[2], rtol=0, atol=0)
    assert not torch.equal(draws[0], draws[1])


def test_the_learning_rate_rises_holds_and_falls_to_zero():
    config = LoopConfig(steps=100, batch_size=1, learning_rate=2.0, warmup_steps=10, cooldown=0.5)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[10] == rates[49] == 2.0
    assert rates[75] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.04)
