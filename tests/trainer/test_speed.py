"""A time for a run before its first step."""

import pytest
import torch

from trainer.cli.main import main
from trainer.config import DistillConfig
from trainer.data.settings import DataConfig
from trainer.estimate import GUESSED, make_plan
from trainer.memory import rehearsal
from trainer.speed import count_operations, operations_per_second, rough_seconds

CPU = torch.device("cpu")


def test_operations_are_those_of_the_matrix_products_also_without_contents():
    """Twice the size of the product: once forward, twice backward."""

    def step():
        weight = torch.zeros(8, 4, requires_grad=True)
        x = torch.zeros(3, 8, requires_grad=True)
        (x @ weight).sum().backward()

    assert count_operations(step) == 3 * 2 * 3 * 8 * 4
    with rehearsal(CPU):
        assert count_operations(step) == 3 * 2 * 3 * 8 * 4


def test_twice_the_operations_take_twice_as_long():
    assert operations_per_second(CPU, torch.float32) > 1e8
    once = rough_seconds(10**9, CPU, torch.float32)
    assert rough_seconds(2 * 10**9, CPU, torch.float32) == pytest.approx(2 * once)


def test_a_plan_has_a_time_before_the_first_step(teachers, photos, tmp_path, capsys):
    data = DataConfig(path=str(photos), resolution=64)
    config = DistillConfig(teacher=str(teachers()), output=str(tmp_path), device="cpu", data=data)
    seconds = make_plan(config).seconds
    assert "training" not in seconds
    assert 0.1 < seconds[GUESSED] < 100_000
    words = ["--teacher", teachers(), "--data", photos, "--output", tmp_path, "--resolution", 64, "--device", "cpu"]
    assert main(["distill", *map(str, words), "--dry-run"]) == 0
    assert "training, a rough guess from its operations" in capsys.readouterr().out
