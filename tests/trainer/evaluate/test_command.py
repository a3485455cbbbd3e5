"""`trainer eval` as a user runs it."""

import json

import pytest

from lcm_core.errors import InputError
from trainer.cli import eval as command


@pytest.fixture
def run_eval(benchmark, monkeypatch):
    """`trainer eval ...` with the small benchmark. Returns the exit code's message, empty if all went well."""
    import argparse

    import trainer.recipes.emoji.benchmark

    monkeypatch.setattr(trainer.recipes.emoji.benchmark, "load_benchmark", lambda samples: benchmark)

    def run(*words):
        parser = argparse.ArgumentParser()
        command.add_eval(parser.add_subparsers())
        args = parser.parse_args(["eval", *map(str, words), "--device", "cpu"])
        try:
            args.run(args)
        except InputError as error:
            return str(error)
        return ""

    return run


def test_the_command_collects_models_in_one_table_and_does_not_measure_twice(run_eval, tmp_path, capsys):
    assert run_eval("--unet", "lcm", "--steps", 1, 2, "--output", tmp_path) == ""
    first = json.loads((tmp_path / "eval.json").read_text())
    assert [(row["model"], row["steps"]) for row in first["rows"]] == [("emoji (lcm)", 1), ("emoji (lcm)", 2)]
    lora = ("--unet", "teacher", "--lora", "lcm_lora")
    assert run_eval(*lora, "--steps", 1, "--guidance", 1, "--output", tmp_path) == ""
    assert run_eval("--unet", "lcm", "--steps", 1, "--output", tmp_path) == ""
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert rows[:2] == first["rows"]
    assert [row["model"] for row in rows] == ["emoji (lcm)"] * 2 + ["emoji (teacher) + lcm_lora"]
    printed = capsys.readouterr()
    assert (tmp_path / "eval.md").read_text() in printed.out
    assert "measured before" in printed.err
    message = run_eval(*lora, "--steps", 2, "--name", "emoji (lcm)", "--output", tmp_path)
    assert "--name" in message  # two models must not be taken for one


def test_scores_against_ones_own_pictures(run_eval, photos, clip_folder, tmp_path):
    words = ("--unet", "lcm", "--steps", 1, "--samples", 8, "--data", photos, "--clip", clip_folder)
    assert run_eval(*words, "--output", tmp_path / "out") == ""
    content = json.loads((tmp_path / "out" / "eval.json").read_text())
    (row,) = content["rows"]
    assert {"fd", "recall", "clip_score"} <= row.keys()
    assert not {"alignment", "fid"} & row.keys()
    assert "other pictures" in run_eval("--unet", "lcm", "--steps", 1, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--inception", "x.safetensors"], "--data"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--clip", "nowhere"], "nowhere does not exist"),
        (["--samples", 3], "--samples 3"),
        (["--model", "nowhere"], "nowhere"),
        (["--lora", "nowhere"], "nowhere"),
        (["--steps", 0], "0 steps"),
        (["--sampler", "magic"], "magic"),
    ],
)
def test_bad_input_is_named(run_eval, tmp_path, words, message):
    assert message in run_eval(*words, "--output", tmp_path / "out")
