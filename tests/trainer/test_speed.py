"""A time for a run before its first step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.cli.main import main
from trainer.config import DistillConfig
from trainer.data.settings import DataConfig
from trainer.estimate import GUESSED, make_plan
from trainer.memory import rehearsal
from trainer.speed import operations_per_second, rough_seconds

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_operations_are_those_of_torchs_own_counter(precision):
    """Of the same with contents: a convolution, attention and both their backward passes."""

    def step():
        convolution, linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 8)
        x = torch.ones(2, 3, 6, 6, requires_grad=True)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            words = linear(convolution(x).flatten(2).transpose(1, 2)).view(2, 1, 16, 8)
            torch.nn.functional.scaled_dot_product_attention(words, words, words).float().sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    with rehearsal(CPU) as memory:
        step()
    assert memory.operations == counter.get_total_flops() > 2 * 3 * 3 * 3 * 8 * 2 * 16


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
