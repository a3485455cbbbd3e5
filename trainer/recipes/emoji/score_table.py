"""The model card's table: the teacher under every solver beside the students, like the paper's Table 1."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lcm_core.files.atomic import atomic_write
from lcm_core.pipeline.model import Model
from trainer.evaluate.scores import benchmark_evaluation, evaluate_rows
from trainer.recipes.emoji.benchmark import Benchmark


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    sampler: str
    steps: int
    guidance_scale: float
    fd: float
    recall: float
    alignment: float
    held_out_alignment: float
    seen_alignment: float
    images_per_second: float


@dataclass
class ScoreTable:
    """The table's lines in a file: each is measured once, and an interrupted table goes on where it stopped."""

    path: Path
    benchmark: Benchmark
    models: dict[str, Model]

    @property
    def rows(self) -> list[Row]:
        return [Row(**line) for line in json.loads(self.path.read_text(encoding="utf-8"))] if self.path.exists() else []

    def row(self, model: str, sampler: str, steps: int, guidance_scale: float) -> Row:
        """The line of this model and sampler, from the file, or measured now."""
        rows = self.rows
        for row in rows:
            if (row.model, row.sampler, row.steps, row.guidance_scale) == (model, sampler, steps, guidance_scale):
                return row
        evaluation = benchmark_evaluation(self.benchmark)
        (scores,) = evaluate_rows(
            model, self.models[model], evaluation, [steps], sampler=sampler, guidance_scale=guidance_scale
        )
        measured = Row(**scores)
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps([asdict(row) for row in [*rows, measured]], indent=1), encoding="utf-8")
        return measured
