"""Checkpoints to choose from, each a whole result, and the way back to one of them."""

import json

import pytest
import torch

import trainer.run
from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from trainer.checkpoints import best_step, checkpoints
from trainer.cli.main import main

QUICK = ["--batch-size", "2", "--rank", "2", "--resolution", "64", "--preview-every", "0", "--no-tensorboard"]


@pytest.fixture
def command(teachers, photos, tmp_path, monkeypatch):
    """Runs that end after the last step."""
    monkeypatch.setattr(trainer.run, "finish", lambda *_: None)
    given = ["--teacher", teachers(), "--data", photos, "--output", tmp_path / "out", "--w-min", 4, "--w-max", 4]

    def run(*words):
        return main(["distill", *map(str, [*given, *words]), *QUICK, "--device", "cpu", "--warmup-steps", "0"])

    return run


def test_the_last_checkpoints_and_the_best_are_kept(command, tmp_path, monkeypatch, capsys):
    losses = iter([0.5, 0.1, 0.3, 0.2])
    monkeypatch.setattr("trainer.checkpoints.held_out_loss", lambda *_: next(losses))
    assert command("--steps", 8, "--checkpoint-every", 2, "--keep-checkpoints", 1, "--holdout", 2) == 0
    found = checkpoints(tmp_path / "out")
    assert list(found) == [4, 8]
    assert best_step(found) == 4
    said = capsys.readouterr().err
    assert "step 4: loss 0.10000 on held-out pictures, the lowest so far" in said
    assert "step 6: loss 0.30000 on held-out pictures\n" in said
    assert {file.name for file in (tmp_path / "out" / "checkpoints" / "step-000004").iterdir()} == {
        "out_lora.safetensors",
        "checkpoint.json",
        "state.safetensors",
    }


def test_a_checkpoint_is_the_result_of_a_run_of_as_many_steps(command, tmp_path):
    """With a constant rate, which does not depend on how many steps there will be; the loss on held-out pictures is
    that of the same weights, however the run came there."""
    options = ["--holdout", 2, "--lr-schedule", "constant", "--checkpoint-every", 2]
    assert command("--steps", 4, *options) == 0
    kept = tmp_path / "out" / "checkpoints" / "step-000002"
    early = read_safetensors(kept / "out_lora.safetensors")[0]
    state = read_safetensors(kept / "state.safetensors")[0]
    assert len(state["log"]) == 2
    name = next(name for name in state if name.startswith("ema."))
    assert any(torch.equal(state[name].half(), tensor) for tensor in early.values())
    losses = [about["held_out_loss"] for about in checkpoints(tmp_path / "out").values()]
    assert losses[0] != losses[1]
    assert command("--steps", 4, *options, "--back-to", 2) == 0
    assert [about["held_out_loss"] for about in checkpoints(tmp_path / "out").values()] == losses


def test_a_run_that_broke_goes_on_from_an_earlier_checkpoint_with_another_rate(command, tmp_path, monkeypatch, capsys):
    options = ["--steps", 6, "--checkpoint-every", 2]
    assert command(*options) == 0
    whole = [json.loads(line) for line in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()]
    assert command(*options, "--back-to", 4, "--lr", "1e-6") == 0
    assert "the learning rate is 1e-06 from here on" in capsys.readouterr().err
    again = [json.loads(line) for line in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in again[:5]] == [
        line["loss"] for line in whole[:5]
    ]  # the fifth is of the old weights
    assert again[5]["learning_rate"] < whole[5]["learning_rate"] / 10
    assert json.loads((tmp_path / "out" / "config.json").read_text())["back_to"] == 0
    assert command(*options, "--back-to", 3) == 2
    assert "has no checkpoint of step 3 to go back to (there are: 2, 4, 6)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--holdout", 1], "add --checkpoint-every, or leave holdout out"),
        (["--holdout", 1, "--method", "dmd2", "--checkpoint-every", 1], "the loss of dmd2 does not say how good"),
        (
            ["--back-to", 2],
            "has no checkpoint of step 2 to go back to (there are: none; --checkpoint-every makes them)",
        ),
    ],
)
def test_what_cannot_be_chosen_or_gone_back_to_is_refused(command, words, message, capsys):
    assert command("--steps", 1, *words) == 2
    assert message in capsys.readouterr().err


def test_the_loss_on_held_out_pictures_is_of_them_alone(command, tmp_path, monkeypatch):
    """Worked out again from the checkpoint's own pictures: only rows that no batch ever draws."""
    seen = []
    real = trainer.checkpoints.make_sample
    monkeypatch.setattr(
        trainer.checkpoints, "make_sample", lambda batch, *rest: seen.append(batch) or real(batch, *rest)
    )
    drawn = []
    read = trainer.run.LatentCache.read
    monkeypatch.setattr(
        trainer.run.LatentCache, "read", lambda self, picks: drawn.append(read(self, picks)) or drawn[-1]
    )
    assert command("--steps", 4, "--holdout", 2, "--checkpoint-every", 4) == 0
    held = {float(x.sum()) for batch in seen for x in batch.latents}
    learnt = {float(x.sum()) for batch in drawn for x in batch.latents} - held
    assert len(held) == 2
    assert len(learnt) == 4
    assert len(drawn) == 4 + len(seen)


def test_a_missing_step_is_told(tmp_path):
    with pytest.raises(InputError, match="there are: none"):
        trainer.checkpoints.check_back_to(tmp_path, 3)
