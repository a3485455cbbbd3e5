"""`benchmarks/quality.py`: what it measures must not have been trained on, and nothing is measured twice."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from trainer.recipes.emoji.benchmark import load_benchmark
from trainer.recipes.emoji.data import SHIPPED, load_shipped, read_entries
from trainer.recipes.emoji.features import load_features

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quality
    import quality_trials

    monkeypatch.setattr(quality_trials, "COMMON", {**quality_trials.COMMON, "batch_size": 2})
    monkeypatch.setattr(quality_trials, "REHEARSAL", 3)
    methods, base = quality_trials.METHODS, quality_trials.BASE
    monkeypatch.setattr(quality_trials, "METHODS", {name: methods[name] for name in ("lcd", "dmd2")})
    monkeypatch.setattr(quality_trials, "BASE", {"lora": base["lora"]})
    monkeypatch.setattr(quality, "STEPS", (1, 4))
    return quality


def _run(quality, folder, monkeypatch, *words):
    options = ["--seconds", "0.01", "--samples", "16", "--seeds", "0", "--device", "cpu"]
    places = ["--work", str(folder / "work"), "--output", str(folder / "out")]
    monkeypatch.setattr(sys, "argv", ["quality.py", *options, *places, *words])
    quality.main()
    with (folder / "out" / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_training_never_sees_the_held_out_pairs():
    """Not one of their captions or pictures is among what `distill --data emoji` learns from."""
    latents, captions = load_shipped()
    entries = read_entries(SHIPPED / "drawings.json")
    held_out = {entry.plain_caption for entry in entries if entry.held_out}
    assert len(held_out) > 100
    assert not held_out & set(captions)
    assert len(latents) == len(captions) == sum(not entry.held_out for entry in entries)
    benchmark = load_benchmark(2048)
    asked = {benchmark.entries[i].plain_caption for i in benchmark.chosen[benchmark.held_out].tolist()}
    assert asked <= held_out


def test_no_gradient_reaches_the_feature_network_and_none_comes_from_it():
    network = load_features(SHIPPED / "features.safetensors")
    assert not any(parameter.requires_grad for parameter in network.parameters())
    for path in (ROOT / "trainer").rglob("*.py"):
        measures = path.parent.name in ("emoji", "evaluate") or path.name in ("eval.py", "validation.py")
        assert measures or "emoji.features" not in path.read_text(), f"{path.name} may look at the benchmark's features"


def test_a_trial_is_trained_scored_and_never_again(quality, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "NOISES", {"coloured": quality.coloured})
    kinds, again = ("as trained", "coloured"), []
    rows = _run(quality, tmp_path, monkeypatch, "--parts", "floor", "methods", "noise")
    found = [(row["part"], row["name"], row["student"], row["steps"]) for row in rows]
    students = [("methods", name, "lora", steps) for name in ("lcd", "dmd2") for steps in ("1", "4")]
    assert set(found) == {
        *students,
        *(("floor", name, "real", "0") for name in ("drawings", "through the VAE")),
        *(("noise", kind, "teacher", "4") for kind in kinds),
        *(("noise", kind, student, steps) for kind in kinds for student in ("full", "lora") for steps in ("1", "4")),
    }
    assert len(found) == len(set(found))
    by_name = {row["name"]: row for row in rows if row["part"] in ("floor", "methods")}
    assert float(by_name["drawings"]["alignment"]) == 1.0  # each is nearest to itself
    assert float(by_name["drawings"]["fd"]) < float(by_name["through the VAE"]["fd"])
    assert int(by_name["dmd2"]["samples_seen"]) == 4  # as lcd, and then as itself
    assert float(by_name["dmd2"]["fd"]) > 0
    assert "| dmd2 | lora |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.csv",
        "table.md",
        "plot.png",
        "pictures.png",
    }
    monkeypatch.setattr(quality, "train", lambda trial, *_: again.append(trial))
    assert _run(quality, tmp_path, monkeypatch, "--parts", "floor", "methods", "noise") == rows
    assert not again


def test_other_noise_keeps_its_spread_and_its_seeds(quality):
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mixed = quality.coloured(noise)
    assert float(mixed.std()) == pytest.approx(float(noise.std()), rel=1e-5)
    neighbours = (mixed[..., 1:] * mixed[..., :-1]).mean() / mixed.var()
    assert float(neighbours) > 0.1
    assert float((noise[..., 1:] * noise[..., :-1]).mean() / noise.var()) < 0.1
