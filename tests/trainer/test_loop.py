"""The training loop: a stopped run must end where an uninterrupted one ends, bit for bit."""

import copy
import json
import os
import shutil
import signal
import socket
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
from lcm_core.files.safetensors import read_safetensors
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


def _losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def _weights(*modules):
    return [p for module in modules for p in module.parameters()]


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, stop_at):
    whole = _run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "parts", stop_at=stop_at)
    parts = _run(tmp_path / "parts")
    torch.testing.assert_close(_weights(*parts), _weights(*whole), rtol=0, atol=0)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")


def _run_pair(folder, config, stop_at=None):
    """A model that is trained in every third step, and a critic of other scale that is in all."""
    torch.manual_seed(0)
    model, critic = nn.Linear(3, 3), nn.Linear(3, 3)

    def loss_fn(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(config.batch_size, 3, generator=generator)
        yield 1000 * (critic(x) - x.flip(1)).square().mean()
        if step % 3 == 0:
            yield (model(x) - x).square().mean()

    train(model, loss_fn, config, folder, copy.deepcopy(model).requires_grad_(False), critic=critic)
    return model, critic


@pytest.mark.parametrize("stop_at", [1, 6, 11])
def test_a_model_and_its_critic_continue_bit_for_bit(tmp_path, stop_at):
    whole = _run_pair(tmp_path / "whole", CONFIG)
    with pytest.raises(KeyboardInterrupt):
        _run_pair(tmp_path / "parts", CONFIG, stop_at)
    parts = _run_pair(tmp_path / "parts", CONFIG)
    torch.testing.assert_close(_weights(*parts), _weights(*whole), rtol=0, atol=0)


def test_a_model_learns_the_same_beside_a_critic_and_rests_between(tmp_path):
    """Its gradients are clipped by themselves, and a step without one is none: no decay, no momentum."""
    config = replace(CONFIG, max_grad_norm=0.1, adam_beta2=0.9)
    model, _ = _run_pair(tmp_path / "pair", config)
    torch.manual_seed(0)
    alone = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.0, betas=(0.9, 0.9), weight_decay=config.weight_decay)
    for step in range(0, config.steps, 3):
        x = torch.randn(config.batch_size, 3, generator=step_generator(config.seed, step))
        optimizer.zero_grad()
        (alone(x) - x).square().mean().backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, config)
        optimizer.step()
    torch.testing.assert_close(_weights(model), _weights(alone))


def test_a_finished_run_is_only_read_again(tmp_path):
    first = _run(tmp_path)
    again = _run(tmp_path, stop_at=0)  # would raise if a step were run
    torch.testing.assert_close(_weights(*again), _weights(*first), rtol=0, atol=0)


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1])  # a state is written after every step, so some die in that
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


def test_ctrl_c_ends_the_step_then_saves(tmp_path):
    """Interrupted in the middle of a step, the state is that of whole steps, and the run continues bit for bit."""
    whole = _run(tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)

    def loss_fn(step, generator):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return _example_loss(model, generator)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    ema = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(KeyboardInterrupt):
        train(model, loss_fn, replace(CONFIG, save_every=1e9), tmp_path / "parts", ema)
    assert read_safetensors(tmp_path / "parts/state.safetensors")[1]["step"] in ("7", "8")
    assert signal.getsignal(signal.SIGINT) is before
    parts = _run(tmp_path / "parts")
    torch.testing.assert_close(_weights(*parts), _weights(*whole), rtol=0, atol=0)


def _example_loss(model, generator):
    x = torch.randn(CONFIG.batch_size, 3, generator=generator)
    return (model(x) - x.flip(1)).square().mean()


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(tmp_path):
    model = nn.Linear(1, 1)
    before = model.weight.detach().clone()
    with pytest.raises(InputError, match="gradient became nan at step 0"):
        train(model, lambda step, generator: (model.weight * 0).sqrt().sum(), CONFIG, tmp_path)
    torch.testing.assert_close(model.weight.detach(), before, rtol=0, atol=0)


def test_the_state_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        _run(tmp_path / "file" / "run")


def test_an_unknown_optimizer_and_a_missing_library_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="unknown optimizer 'sgd'"):
        _run(tmp_path, replace(CONFIG, optimizer="sgd"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError, match="needs bitsandbytes"):
        _run(tmp_path, replace(CONFIG, optimizer="adamw8bit"))


def test_moments_that_are_plain_numbers_come_back_as_such(tmp_path):
    """As bitsandbytes keeps its step."""
    from trainer.state import Log, State

    parameter = nn.Parameter(torch.ones(2))
    for saved in (True, False):
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        state = State(tmp_path, {"w": parameter}, optimizer, None)
        if saved:
            optimizer.state[parameter] = {"step": 3, "state1": torch.arange(2, dtype=torch.uint8)}
            state.record(Log(0, 1.0, 0.1, 0.5, 12))
            state.save()
        else:
            assert state.load() == 1
            assert state.log == [Log(0, 1.0, 0.1, 0.5, 12)]
            found = optimizer.state[parameter]
            assert type(found["step"]) is int
            assert found["step"] == 3
            torch.testing.assert_close(found["state1"], torch.arange(2, dtype=torch.uint8))


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    """Losses of eight steps, by how many processes made the first four and the last four."""
    pytest.importorskip("accelerate")
    root = tmp_path_factory.mktemp("shared")
    for count in (1, 2):
        _launch(root / str(count), 4, count)
    runs = {}
    for first, last in ((1, 1), (2, 1), (1, 2)):
        folder = root / f"{first}-{last}"
        shutil.copytree(root / str(first), folder)
        _launch(folder, 8, last)
        runs[first, last] = torch.tensor(_losses(folder))
    return runs


def _launch(folder, steps, count):
    """`distill` on a small network in `count` processes that talk by gloo, as `accelerate launch` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parent
    code = "import sys; sys.path.insert(0, sys.argv[1]); import shared_work; shared_work.main(*sys.argv[2:])"
    command = [sys.executable, "-c", code, str(here), str(folder), str(steps)]
    common = {**os.environ, "PYTHONPATH": str(here.parents[1]), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    workers = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(count)
    ]
    for worker in workers:
        _, messages = worker.communicate(timeout=300)
        assert worker.returncode == 0, messages.decode()


@pytest.mark.parametrize("counts", [(2, 1), (1, 2)])
def test_several_processes_have_the_losses_of_one(shared_runs, counts):
    """The same global batch of 6, whoever computes it, also when a run is continued by another number of them."""
    torch.testing.assert_close(shared_runs[counts], shared_runs[1, 1], rtol=0, atol=1e-4)
    assert shared_runs[1, 1].std() > 1e-3, "the losses say nothing when they are all alike"
