"""What a run was begun with, by content: the files of its teacher, its data and its start, which may change later."""

from __future__ import annotations

from pathlib import Path

from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_json, read_safetensors, write_json
from trainer.config import DistillConfig
from trainer.control import hash_control
from trainer.data.cache import Plan
from trainer.data.hashing import hash_tensors
from trainer.setup import Setup, say
from trainer.state import has_state


def hash_inputs(setup: Setup, plan: Plan) -> dict[str, str]:
    """What was given -> a hash of its content."""
    inputs = {
        f"teacher {setup.config.teacher}": setup.teacher.hash_unet(setup.info.prediction_type),
        f"data {_data(setup.config)}": plan.hash_pictures(),
        "captions, or the teacher's text encoders": plan.hash_captions(),
    }
    if setup.config.control:
        inputs[f"control {setup.config.control}"] = hash_control(setup.config, setup.source)
    start = Path(setup.config.student.start)
    if start.is_file():
        inputs[f"start {start}"] = hash_tensors(read_safetensors(start)[0])
    return inputs


def check_inputs(setup: Setup, plan: Plan, remember: bool = True) -> None:
    """Refuse to go on with a run whose teacher or data have other contents than when it began.

    Args:
        setup, plan: of the run.
        remember: whether to write down what the contents are now, for later starts.

    Raises:
        InputError: names the first that changed, with the ways on.
    """
    file = setup.folder / "run" / "inputs.json"
    found = hash_inputs(setup, plan)
    before = read_json(file) if file.is_file() and has_state(file.parent) else {}
    changed = [name for name, value in found.items() if before.get(name, value) != value]
    if changed and not setup.config.accept_changes:
        raise InputError(
            f"{changed[0]} has changed since the run in {setup.folder} began; put it back, choose another --output, or "
            "give --accept-changes to go on with it as it is now"
        )
    for name in changed:
        say(f"note: {name} has changed since this run began")
    if remember:
        write_json(file, found)


def _data(config: DistillConfig) -> str:
    return config.data.path or config.data.prompts
