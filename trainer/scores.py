"""The scores of a run, kept row by row, so that none is measured twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcm_core.files.safetensors import read_json, write_json
from lcm_core.pipeline import PictureOptions, Pipeline
from lcm_core.pipeline.model import Model
from trainer.evaluate.scores import Evaluation, evaluate_rows
from trainer.report.preview import STEPS
from trainer.report.tables import remark

RESULTS = "results.json"
TEACHER_STEPS = 25
"""What a teacher is used with; it is shown and scored so too, beside the numbers of steps of the student."""


def shown_steps(role: str) -> tuple[int, ...]:
    """Numbers of steps that a "teacher" or a "student" is shown and scored with."""
    return (*STEPS, TEACHER_STEPS) if role == "teacher" else STEPS


@dataclass
class Scores:
    """The rows of a run's table.

    Attributes:
        file: where they are kept.
        about: what they were measured with: the evaluation, and a hash of each role's weights.
        rows: by the names in `trainer.report.tables.COLUMNS`, and the `role`.
        remark: what they were measured on, in words.
    """

    file: Path
    about: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    remark: str = ""

    @classmethod
    def read(cls, folder: Path) -> Scores:
        """All rows that a run's folder has.

        Raises:
            InputError: the file is damaged.
        """
        file = folder / RESULTS
        held = read_json(file) if file.is_file() else {}
        return cls(file, held.get("about", {}), held.get("rows", []), held.get("remark", ""))

    @classmethod
    def open(cls, folder: Path, evaluation: Evaluation | None, weights: Mapping[str, str]) -> Scores:
        """The rows that are still true.

        Args:
            folder: of the run.
            evaluation: what is measured; None for nothing.
            weights: role -> hash of what paints.
        """
        before = cls.read(folder)
        about = {"evaluation": {} if evaluation is None else evaluation.note, **weights}
        same = {role for role in weights if before.about.get(role) == weights[role]}
        same = same if before.about.get("evaluation") == about["evaluation"] else set()
        words = "" if evaluation is None else remark(evaluation.note, evaluation.distance)
        scores = cls(before.file, about, [row for row in before.rows if row.get("role") in same], words)
        scores.write()
        return scores

    def add(
        self, role: str, name: str, model: Model, evaluation: Evaluation, steps: int, guidance_scale: float
    ) -> None:
        """Measure one row, unless it is there, and keep it."""
        settings = Pipeline(model).resolve(PictureOptions(num_inference_steps=steps, guidance_scale=guidance_scale))
        key = (role, settings.sampler, steps, guidance_scale)
        if key in [(row["role"], row["sampler"], row["steps"], row["guidance_scale"]) for row in self.rows]:
            return
        found = evaluate_rows(name, model, evaluation, [steps], progress=True, guidance_scale=guidance_scale)
        self.rows += [{"role": role, **row} for row in found]
        self.write()

    def write(self) -> None:
        """Keep all rows."""
        write_json(self.file, {"rows": self.rows, "remark": self.remark, "about": self.about})
