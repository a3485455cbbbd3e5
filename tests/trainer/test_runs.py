"""Two starts of one run: with other contents behind the same names, at the same time, or after it was finished."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import trainer.run
import trainer.scores
from lcm_core.files.safetensors import read_safetensors, write_safetensors
from trainer.cli.main import main
from trainer.lock import lock_folder
from trainer.loop import LoopConfig, train

QUICK = ["--batch-size", "2", "--rank", "2", "--resolution", "64", "--preview-every", "0", "--no-tensorboard"]


@pytest.fixture
def given(teachers, photos, tmp_path):
    """A command, and copies of its teacher and data that may be changed."""
    teacher, data, output = tmp_path / "teacher", tmp_path / "data", tmp_path / "out"
    shutil.copytree(teachers(), teacher, symlinks=True)
    shutil.copytree(photos, data)
    words = ["distill", "--teacher", teacher, "--data", data, "--output", output, "--w-min", 4, "--w-max", 4, *QUICK]
    return [str(word) for word in words], teacher, data, output


def _change_teacher(teacher, data):
    file = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(file)[0].items()}
    tensors["conv_in.bias"] += 1
    write_safetensors(file, tensors)


def _add_picture(teacher, data):
    Image.new("RGB", (64, 64)).save(data / "new.png")


def _change_caption(teacher, data):
    (data / "0.txt").write_text("something else")


@pytest.fixture
def learning_alone(monkeypatch):
    """Runs end after the last step, without weights, pictures and a report, for tests that look at none of these."""
    monkeypatch.setattr(trainer.run, "finish", lambda *_: None)


def test_other_contents_behind_the_same_names_are_refused_until_they_are_accepted(given, capsys, learning_alone):
    """By the plan of --dry-run too, which changes nothing."""
    command, teacher, data, output = given
    assert main([*command, "--steps", "1"]) == 0
    changes = ((_change_teacher, "teacher "), (_add_picture, "data "), (_change_caption, "captions"))
    for number, (change, words) in enumerate(changes):
        change(teacher, data)
        before = {file: file.read_bytes() for file in (output / "run").glob("*.*")}
        for options in (["--dry-run"], []):
            capsys.readouterr()
            assert main([*command, "--steps", str(number + 2), *options]) == 2
            message = capsys.readouterr().err.splitlines()[-1]
            assert message.startswith(f"error: {words}")
            assert "has changed since the run" in message
            assert "--accept-changes" in message
        assert {file: file.read_bytes() for file in (output / "run").glob("*.*")} == before
        assert main([*command, "--steps", str(number + 2), "--accept-changes"]) == 0
        assert "has changed since this run began" in capsys.readouterr().err
    assert main([*command, "--steps", "5"]) == 0  # what was accepted is what the run is of now


def test_a_second_run_in_the_same_folder_is_refused(given, capsys):
    command, _, _, output = given
    code = "import sys, pathlib, trainer.lock as t; l = t.lock_folder(pathlib.Path(sys.argv[1])); l.__enter__()"
    code += "; print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", code, str(output)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert main([*command, "--steps", "1"]) == 2
        other.kill()  # in whatever way it ends, the folder is free again
    assert f"{output} is in use by another run" in capsys.readouterr().err
    assert not (output / "run").exists()
    with lock_folder(output):
        pass


def test_a_changed_learning_rate_is_said(given, capsys, learning_alone):
    command, _, _, _ = given
    assert main([*command, "--steps", "1"]) == 0
    assert main([*command, "--steps", "2", "--learning-rate", "1e-5"]) == 0
    assert "the learning rate is 1e-05 from here on, no longer 0.0001" in capsys.readouterr().err


def test_a_finished_run_is_scored_once_and_after_more_steps_only_the_student_again(given, monkeypatch):
    command, _, _, output = given
    measured = []

    def measure(name, model, evaluation, steps, *_, **options):
        measured.append((name, *steps))
        if len(measured) == 3 and not (output / "report.html").exists():
            raise KeyboardInterrupt
        settings = {"sampler": model.settings().sampler, "steps": steps[0], "guidance_scale": options["guidance_scale"]}
        return [{"model": name, **settings, "fd": 1.0, "images_per_second": 2.0}]

    monkeypatch.setattr(trainer.scores, "evaluate_rows", measure)
    once = [*command, "--steps", "1", "--samples", "8"]
    assert main(once) == 130
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [1, 2]
    assert main(once) == 0
    student = [("out", steps) for steps in (1, 2, 4, 8)]
    assert measured[3:] == [("teacher", 4), ("teacher", 8), ("teacher", 25), *student]
    remark = json.loads((output / "results.json").read_text())["remark"]
    assert "has seen emoji alone" in remark
    del measured[:]
    assert main(once) == 0
    assert measured == []
    assert main([*command, "--steps", "2", "--samples", "8"]) == 0
    assert measured == student


def test_the_critics_own_steps_leave_the_average_where_it_is(tmp_path):
    model, average, critic = (torch.nn.Linear(2, 2) for _ in range(3))
    seen = []

    def loss_fn(step, generator):
        loss = critic.weight.square().sum()
        return loss + model.weight.square().sum() if step % 3 == 0 else loss

    def watch(step, loss):
        seen.append(average.weight.detach().clone())

    loop = LoopConfig(steps=4, batch_size=1, learning_rate=0.1, warmup_steps=0, cooldown=0.0)
    train(model, loss_fn, loop, tmp_path, average, watch, critic=critic)
    torch.testing.assert_close(seen[1:3], [seen[0]] * 2, rtol=0, atol=0)
    assert not torch.equal(seen[3], seen[2])
