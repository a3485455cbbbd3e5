"""Checkpoints: the result as it is at some steps, to choose from, each with the state to go back to."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lcm_core.errors import InputError
from lcm_core.files.atomic import new_folder
from lcm_core.files.safetensors import read_json, write_json
from trainer.data.cache import LatentCache
from trainer.loop import step_generator
from trainer.methods.method import get_method, make_sample
from trainer.outputs import write_weights
from trainer.setup import Setup, say
from trainer.state import STATE, keep_copy
from trainer.students import Student

FOLDER, ABOUT, PREVIEW = "checkpoints", "checkpoint.json", "preview.png"
_ROUNDS = 4  # times that each held-out picture is noised; of few pictures one would say little
_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(
    setup: Setup, student: Student, cache: LatentCache, preview: Callable[[Path], None] | None, step: int, loss: float
) -> None:
    """Every so many steps, write `checkpoints/step-000500`: the weights, a preview, the loss on held-out pictures and
    the state. Then remove those that are neither among the last ones nor the best.

    Args:
        setup, student, cache: of the run.
        preview: writes a picture of the student to a path; None for none.
        step, loss: that was done; the state was saved behind it.
    """
    training, done = setup.config.training, step + 1
    if not training.checkpoint_every or done % training.checkpoint_every:
        return
    place = setup.folder / FOLDER / f"step-{done:06d}"
    shutil.rmtree(place, ignore_errors=True)  # of before the run went back
    held_out = held_out_loss(setup, student, cache) if setup.config.data.holdout else None
    with new_folder(place) as temporary:
        write_weights(setup.config, student, setup.source, setup.info, temporary)
        if preview is not None:
            preview(temporary / PREVIEW)
        keep_copy(setup.folder / "run" / STATE, temporary / STATE)
        write_json(temporary / ABOUT, {"step": done, "loss": loss, "held_out_loss": held_out})
    best = best_step(checkpoints(setup.folder))
    if held_out is not None:
        say(f"step {done}: loss {held_out:.5f} on held-out pictures" + (", the lowest so far" if best == done else ""))
    _remove_others(setup.folder, training.keep_checkpoints, best)


@torch.no_grad()
def held_out_loss(setup: Setup, student: Student, cache: LatentCache) -> float:
    """The mean loss of the result, i.e. of the average, on pictures that it has not learnt from; each time with the
    same noise, so that only the weights make a difference."""
    method, training = setup.config.method, setup.config.training
    chosen, device = get_method(method), next(student.trained.parameters()).device
    networks = student.networks._replace(online=student.networks.target)
    size = max(1, training.batch_size // (training.accumulation * setup.processes.size))
    losses = []
    for number, picks in enumerate([*cache.held_out(size)] * _ROUNDS):
        batch = cache.read(picks)
        if student.reads_guidance:
            batch = replace(batch, null_conditioning=None)
        sample = make_sample(batch, method, setup.diffusion, step_generator(training.seed, number)).to(device)
        losses.append(chosen.loss(networks, sample, setup.diffusion, method))
    return float(torch.cat(losses).mean())


def checkpoints(folder: Path) -> dict[int, dict[str, Any]]:
    """The checkpoints in a run's folder: step -> what its `checkpoint.json` says."""
    files = {int(found[1]): path for path in folder.glob(f"{FOLDER}/*") if (found := _NAME.fullmatch(path.name))}
    return {step: read_json(files[step] / ABOUT) for step in sorted(files)}


def best_step(found: Mapping[int, Mapping[str, Any]]) -> int | None:
    """The one with the lowest loss on held-out pictures; None where it was not measured."""
    losses = {step: about["held_out_loss"] for step, about in found.items() if about.get("held_out_loss") is not None}
    return min(losses, key=lambda step: losses[step], default=None)


def check_back_to(folder: Path, step: int) -> None:
    """Refuse to go back to where no checkpoint is.

    Raises:
        InputError: names those that there are.
    """
    found = checkpoints(folder)
    if step not in found:
        there = ", ".join(map(str, found)) or "none; --checkpoint-every makes them"
        raise InputError(f"{folder} has no checkpoint of step {step} to go back to (there are: {there})")


def go_back(folder: Path, step: int) -> None:
    """Make the state of a checkpoint that of the run, which goes on from there."""
    keep_copy(folder / FOLDER / f"step-{step:06d}" / STATE, folder / "run" / STATE)


def _remove_others(folder: Path, kept: int, best: int | None) -> None:
    steps = list(checkpoints(folder))
    for step in steps[:-kept] if kept else []:
        if step != best:
            shutil.rmtree(folder / FOLDER / f"step-{step:06d}")
