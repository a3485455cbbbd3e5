"""Going on with a run: which of its settings may be others than when it began, and which would make it another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError
from trainer.config import DistillConfig
from trainer.state import has_state
from trainer.toml import read_settings

SETTINGS = "config.json"
"""File of a run's folder with what it was last started with."""
MAY_CHANGE = {
    "output",
    "name",
    "device",
    "accept_changes",
    "back_to",
    "report",
    "data.cache",
    "data.cache_batch",
    "data.shard_size",
    "student.sharded",
    "student.offload",
    "student.gradient_checkpointing",
    "student.compile",
    "training.steps",
    "training.learning_rate",
    "training.lr_schedule",
    "training.save_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.accumulation",
    "training.tensorboard",
    "training.trackers",
}
"""Settings that a run may be continued with other values of."""


def earlier_settings(folder: Path) -> dict[str, Any]:
    """What a run's folder says that it was started with; empty where there is nothing to go on with.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / SETTINGS
    return read_settings(file) if file.exists() and has_state(folder / "run") else {}


def changes(folder: Path, config: DistillConfig) -> list[str]:
    """Which of the settings that decide what is learnt are others than when the run began, one line each."""
    rate = config.training.learning_rate
    before = _flat(earlier_settings(folder)).get("training.learning_rate", rate)
    return [] if before == rate else [f"the learning rate is {rate:g} from here on, no longer {before:g}"]


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    """Refuse to continue a run with settings that would make it another one.

    Raises:
        InputError: names the setting with both its values.
    """
    was = _flat(before)
    for key, value in _flat(now).items():
        old = was.get(key, value)
        free = key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE
        if old != value and not free:
            raise InputError(
                f"{file} is of a run with {key} = {old!r}, not {value!r}; give that, --config {file} for all of its "
                "settings in place of a preset, or another output folder"
            )


def _flat(settings: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{section}.{key}" if section else key
        flat |= _flat(value, name) if isinstance(value, Mapping) else {name: value}
    return flat
