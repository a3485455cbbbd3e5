"""The command as users run it: stopped, killed, continued, and given what it cannot use."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import trainer.setup
import trainer.students
from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks import frozen
from trainer.cli.main import main
from trainer.config import StudentConfig
from trainer.setup import check_offload

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", "6", "--batch-size", "4", "--rank", "2", "--save-every", "0"]
QUICK = [*SMALL, "--samples", "0", "--preview-every", "0", "--no-tensorboard"]


def _command(teacher, data, output, *words):
    return ["distill", "--teacher", *(str(w) for w in (teacher, "--data", data, "--output", output, *QUICK, *words))]


def _start(command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "trainer", *command]
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_a_run_that_is_stopped_says_how_to_go_on_and_does(teachers, photos, tmp_path, capsys, monkeypatch):
    """Ctrl-C during a preview, the longest thing between two steps, costs nothing of what was learnt."""
    import trainer.run

    command = _command(teachers(), photos, tmp_path / "parts")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.run, "save_preview", interrupted)
        assert main(command) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert read_safetensors(tmp_path / "parts/run/state.safetensors")[1]["step"] == "1"
    assert main(command) == 0
    assert main(_command(teachers(), photos, tmp_path / "whole")) == 0
    assert (tmp_path / "parts/parts_lora.safetensors").exists()
    _assert_same_state(tmp_path / "parts", tmp_path / "whole")


def _assert_same_state(a, b):
    states = [read_safetensors(folder / "run" / "state.safetensors")[0] for folder in (a, b)]
    for state in states:
        state["log"] = state["log"][:, :3]  # without seconds and memory
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher", "no/such.safetensors"], "no/such.safetensors"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--prediction-type", "noise"], "unknown prediction_type 'noise'"),
        (["--precision", "int4"], "unknown dtype 'int4'"),
        (["--w-min", "3", "--w-max", "2"], "w_min=3, w_max=2"),
        (["--method", "dmd2", "--critic-updates", "0"], "critic_updates 0 is out of range"),
        (["--accumulation", "5"], "batch_size=4 is too small"),
        (["--compile"], "CUDA only"),
        (["--offload"], "offload is for CUDA"),
        (["--target-modules", "nothing"], "no modules named nothing"),
        (["--data", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(teachers, photos, tmp_path, capsys, words, message):
    assert main(_command(teachers(), photos, tmp_path / "out", *words)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out" / "run" / "state.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start", "no/such_lora.safetensors"], "start no/such_lora.safetensors is not there"),
        (["--student", "full", "--start", "no/such/model.safetensors"], "no/such/model.safetensors"),
        (["--method", "segmented", "--phases", "99"], "phases=99"),
        (["--sharded", "--preview-every", "5"], "preview_every does not go with sharded"),
        (["--sharded", "--preview-every", "0", "--base-dtype", "int8"], "base_dtype does not go with sharded"),
        (["--sharded", "--preview-every", "0", "--offload"], "offload"),
        (["--original-steps", "2000"], "original_steps=2000"),
    ],
)
def test_what_could_be_known_is_refused_before_pictures_are_encoded(teachers, photos, tmp_path, capsys, words, message):
    assert main(_command(teachers(), photos, tmp_path / "out", *words)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "cache").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"kind": "full"}, "a full student trains all"),
        ({"base_dtype": "nf4"}, "choose int8 or fp8"),
        ({"compile": True}, "compile does not go with offload"),
    ],
)
def test_what_does_not_go_with_weights_in_main_memory_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        check_offload(StudentConfig(offload=True, **words), torch.device("cuda"))
    check_offload(StudentConfig(offload=True, base_dtype="int8"), torch.device("cuda"))
    check_offload(StudentConfig(**words), torch.device("cpu"))


@pytest.mark.parametrize("words", [["--gradient-checkpointing"], ["--base-dtype", "int8"]], ids=["plain", "int8"])
def test_an_unet_in_main_memory_teaches_the_same(teachers, photos, tmp_path, monkeypatch, words):
    monkeypatch.setattr(trainer.setup, "check_offload", lambda *_: None)
    monkeypatch.setattr(frozen, "_FEW", 64)
    monkeypatch.setattr(trainer.students, "use_matrix_products", lambda _: None)  # which adds up in another order
    words = ["--steps", "2", "--cache", tmp_path / "cache", *words]
    assert main(_command(teachers(), photos, tmp_path / "plain", *words)) == 0
    assert main(_command(teachers(), photos, tmp_path / "offloaded", *words, "--offload")) == 0
    states = [read_safetensors(tmp_path / name / "run/state.safetensors")[0] for name in ("plain", "offloaded")]
    for state in states:
        del state["log"]
    torch.testing.assert_close(*states)


def test_a_loss_that_is_not_finite_names_the_step_and_the_file(teachers, photos, tmp_path, capsys):
    words = ["--learning-rate", "1", "--warmup-steps", "1", "--loss", "l2", "--huber-c", "1", "--noise-offset", "1e30"]
    assert main(_command(teachers(), photos, tmp_path, *words)) == 2
    message = capsys.readouterr().err
    assert "at step 0" in message
    assert str(tmp_path / "run" / "state.safetensors") in message


def test_other_settings_in_the_same_folder_are_refused(teachers, photos, tmp_path, capsys):
    command = _command(teachers(), photos, tmp_path, "--steps", 1)
    assert main(command) == 0
    assert main([*command, "--rank", "3"]) == 2
    assert "student.rank = 2, not 3" in capsys.readouterr().err


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(teachers, photos, tmp_path):
    """SIGKILL while it loads, caches, trains, or writes a state or a result; then the same command, to the end."""
    whole = tmp_path / "whole"
    started = time.monotonic()
    assert _start(_command(teachers(), photos, whole)).wait() == 0
    duration = time.monotonic() - started
    moments = random.Random(0)
    for number in range(20):
        folder = tmp_path / f"killed-{number}"
        command = _command(teachers(), photos, folder)
        process = _start(command)
        time.sleep(duration * moments.uniform(0.05, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for file in folder.rglob("*.safetensors") if folder.exists() else ():
            if not file.name.startswith("."):
                read_safetensors(file)  # whole, though its writer died at any moment
        process = _start(command)
        _, messages = process.communicate()
        assert process.returncode == 0, messages.decode()
        _assert_same_state(folder, whole)
        results = [read_safetensors(f / f"{f.name}_lora.safetensors")[0] for f in (folder, whole)]
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_two_launched_processes_have_the_losses_of_one(teachers, photos, tmp_path):
    """The real command on a U-Net, two processes that talk by gloo beside one. Started by torchrun, as `accelerate
    launch --multi_gpu` starts it: without GPUs accelerate itself starts several processes with MPI only."""
    pytest.importorskip("accelerate")
    losses = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command = [*launch, "-m", "trainer", *_command(teachers(), photos, folder, "--device", "cpu")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
        machine = json.loads((folder / "run" / "machine.json").read_text())
        assert machine.get("processes", "1") == str(count)
        losses[count] = read_safetensors(folder / "run" / "state.safetensors")[0]["log"][:, 1]
    torch.testing.assert_close(losses[2], losses[1], rtol=0, atol=1e-4)
