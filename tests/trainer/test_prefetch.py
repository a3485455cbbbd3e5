"""Batches that worker processes prepare ahead are those that are made when they are asked for."""

import sys

import pytest
import torch

from trainer.data.prefetch import Prefetch
from trainer.loop import step_generator


def draw(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, generator=step_generator(7, step)), torch.tensor([step])


@pytest.mark.skipif(sys.platform == "win32", reason="workers are forked")
def test_worker_processes_change_nothing():
    alone, ahead = Prefetch(draw, 20), Prefetch(draw, 20, workers=2)
    for step in [*range(3, 9), *range(15, 20), 0, 1]:  # a run that goes on at step 3, and jumps
        for expected, given in zip(alone(step), ahead(step), strict=True):
            torch.testing.assert_close(given, expected, rtol=0, atol=0)


@pytest.mark.skipif(sys.platform == "win32", reason="workers are forked")
def test_an_error_in_a_worker_reaches_the_run():
    def broken(step: int) -> torch.Tensor:
        raise ValueError(f"step {step}")

    with pytest.raises(ValueError, match="step 4"):
        Prefetch(broken, 9, workers=2)(4)
