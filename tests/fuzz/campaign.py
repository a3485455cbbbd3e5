"""Many inputs, from numbered seeds, with every fault kept: `python -m tests.fuzz.campaign RESULTS --inputs 10000`.

A seed of a kind always gives the same inputs. RESULTS gets a line of JSON for each that is done, and the same command
goes on behind the last one; with other code, begin another file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from tests.core.conftest import make_models
from tests.fuzz.guards import Case, Worker
from tests.fuzz.kinds import KINDS, add_files, start_worker

INPUTS = 25
"""Inputs of one seed."""


def run_seed(worker: Worker, cases: SearchStrategy[Case], number: int, inputs: int = INPUTS) -> tuple[int, list[str]]:
    """Run the inputs of a seed. Returns how many there were, and each bar that was broken with the input that did."""
    ran, faults = 0, []

    @seed(number)
    @settings(
        max_examples=inputs,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def check(case: Case) -> None:
        nonlocal ran
        ran += 1
        faults.extend(f"{fault} | {case!r:.2000}" for fault in worker.faults(case))

    check()
    return ran, faults


def remaining(results: list[dict[str, object]], inputs: int) -> Iterator[tuple[str, int]]:
    """The kinds and seeds that are still to be run, one seed of each kind after the other."""
    done = {(row["kind"], row["seed"]) for row in results}
    total = sum(slow for _, slow in KINDS.values())
    seeds = {kind.__name__: -(-slow * inputs // total // INPUTS) for kind, (_, slow) in KINDS.items()}
    for number in range(max(seeds.values())):
        yield from ((name, number) for name, last in seeds.items() if number < last and (name, number) not in done)


def summary(results: list[dict[str, object]]) -> Mapping[str, int]:
    """Inputs run, and how often each fault was seen."""
    seen = Counter(str(fault).partition(" | ")[0][:160] for row in results for fault in row["faults"])  # type: ignore
    return {"inputs": sum(int(row["inputs"]) for row in results), **dict(seen.most_common())}  # type: ignore


def main() -> None:
    """Run what is left and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--inputs", type=int, default=10_000)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    kinds = {kind.__name__: kind for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder, args.results.open("a") as file:
        models = Path(folder, "models")
        models.mkdir()
        add_files(make_models(models, least=True))
        with closing(start_worker(Path(folder, "work"), models)) as worker:
            for name, number in remaining(rows, args.inputs):
                ran, faults = run_seed(worker, kinds[name](models), number)
                rows.append({"kind": name, "seed": number, "inputs": ran, "faults": faults})
                print(json.dumps(rows[-1]), file=file, flush=True)
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
