"""The kinds of input, and the worker and models that all of them are tried with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hypothesis.strategies import SearchStrategy

import lcm_core
from tests.fuzz import commands, models, parts, pictures, training, weights
from tests.fuzz.guards import Case, Worker

Strategy = Callable[[Path], SearchStrategy[Case]]

KINDS: dict[Strategy, tuple[int, int]] = {
    weights.file_case: (12, 1500),
    weights.lora_case: (12, 2000),
    pictures.picture_case: (12, 2000),
    models.folder_case: (16, 2000),
    commands.command_case: (8, 1000),
    training.data_case: (4, 500),
    training.settings_case: (6, 1000),
    parts.control_case: (4, 1000),
    parts.vae_case: (4, 500),
    parts.quantised_case: (4, 500),
    parts.teacher_case: (4, 1000),
}
"""Strategies, and how many inputs each gives to the plain run and to the slow one."""


def add_files(tiny_models: Path) -> Path:
    """Put `plain.safetensors` and the folder `parts` beside the folders that `make_models` makes."""
    from lcm_core.cli.main import main

    file = tiny_models / "plain.safetensors"
    if not file.exists():
        parts.make_parts(tiny_models)
        assert main(["export", "--to", "single-file", "--model", str(tiny_models / "plain"), "--path", str(file)]) == 0
    return tiny_models


def start_worker(root: Path, tiny_models: Path) -> Worker:
    """A worker in which everything that a command line runs through has been imported."""
    started = Worker(root, Path(lcm_core.__file__).parents[1])
    model, lora = str(tiny_models / "plain"), str(tiny_models / "emoji/lora/lcm_lora.safetensors")
    started.warm("lcm_core.cli.main", ["generate", "a cat", "--model", model, "--lora", lora, *weights.QUICK])
    started.warm("lcm_core.cli.main", ["info", str(tiny_models / "plain.safetensors")])
    # not as far as a gradient, whose threads a fork would miss
    started.warm(
        "trainer.cli.main", ["distill", "--teacher", model, "--data", "nowhere", "--output", "out", "--dry-run"]
    )
    (root / "data").mkdir()
    (root / "data" / "0.png").write_bytes(training.picture())
    options = ["--teacher", model, "--data", str(root / "data"), "--output", "out", "--resolution", "64"]
    started.warm("trainer.cli.main", ["cache", *options])
    return started
