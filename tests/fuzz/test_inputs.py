"""No input, however odd, ends in a traceback, a hang, a file in a wrong place, or two gigabytes of memory.

The bars are in `guards.py`; each kind of input has a file of its own here. The plain run is the same each time, the
slow one draws 10,000 other inputs; pytest's `--hypothesis-seed` repeats one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.fuzz.guards import Case, Worker
from tests.fuzz.kinds import KINDS, Strategy
from tests.fuzz.mutations import odd


def fuzz(worker: Worker, cases: SearchStrategy[Case], count: int, repeatable: bool) -> None:
    """Run cases until one breaks a bar; in the slow run hypothesis then looks for the smallest that does."""

    @settings(
        max_examples=count,
        derandomize=repeatable,
        phases=[Phase.generate] if repeatable else [Phase.generate, Phase.shrink],  # shrinking may take minutes
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def check(case: Case) -> None:
        assert worker.faults(case) == []

    check()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_same_inputs_each_time(worker: Worker, tiny_models: Path, kind: Strategy) -> None:
    fuzz(worker, kind(tiny_models), KINDS[kind][0], repeatable=True)


@settings(max_examples=20, derandomize=True, database=None, deadline=None)
@given(st.lists(odd, min_size=40, max_size=40))
def test_no_value_is_part_of_two_inputs(values: list[Any]) -> None:
    """A list that one input has changed would be another one in the next, and a seed would not give the same again."""
    containers = [id(value) for value in values if isinstance(value, (list, dict))]
    assert len(set(containers)) == len(containers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_ten_thousand_other_inputs(worker: Worker, tiny_models: Path, kind: Strategy) -> None:
    fuzz(worker, kind(tiny_models), KINDS[kind][1], repeatable=False)
