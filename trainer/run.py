"""One run of `distill`, from its settings to the files that it leaves in its folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lcm_core.diffusion.schedule import NoiseSchedule
from lcm_core.errors import InputError
from lcm_core.files.checkpoint import Component, ModelInfo, read_component
from lcm_core.files.safetensors import read_safetensors, write_json
from lcm_core.networks.device import choose_device
from lcm_core.networks.unet import exact_output, load_unet
from lcm_core.pipeline.model import Source, find_source, noise_schedule
from trainer.config import DistillConfig
from trainer.data.cache import LatentCache, prepare, write_skipped
from trainer.data.teacher import find_teacher
from trainer.distill import check_method, distill
from trainer.distributed import Processes, join_processes
from trainer.machine import describe_machine
from trainer.methods.method import get_method
from trainer.options import read_settings, to_dict
from trainer.outputs import write_card, write_weights, write_workflow
from trainer.report.page import write_report
from trainer.report.tables import to_markdown
from trainer.students import (
    Student,
    choose_precision,
    full_student,
    lora_student,
    prepare_unet,
    trained_parameters,
    unet_network,
)
from trainer.validation import painter, preview_prompts, save_preview, show_off

MAY_CHANGE = {
    "output",
    "name",
    "device",
    "report",
    "data.cache",
    "data.cache_batch",
    "data.shard_size",
    "student.gradient_checkpointing",
    "student.compile",
    "training.steps",
    "training.save_every",
    "training.accumulation",
    "training.tensorboard",
}
"""Settings that a run may be continued with other values of."""


@dataclass(frozen=True)
class Setup:
    """What a run has found out before it trains."""

    config: DistillConfig
    source: Source
    info: ModelInfo
    schedule: NoiseSchedule
    processes: Processes

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.config.output)


def run(config: DistillConfig) -> None:
    """Distil, from wherever an earlier run in the same folder stopped, and write everything that a run leaves.

    Raises:
        InputError: a setting, a file or a folder that cannot be used.
        KeyboardInterrupt: stopped; the state is saved.
    """
    setup, student, prompts = learn(config)
    if setup.processes.is_main:
        finish(setup, student, prompts)


def learn(config: DistillConfig) -> tuple[Setup, Student, list[str]]:
    """Distil, from wherever an earlier run in the same folder stopped. Returns also the prompts of its previews.

    Raises: as `run`.
    """
    setup = begin(config)
    team, folder = setup.processes, setup.folder
    cache = prepare(
        config.data,
        config.teacher,
        Path(config.data.cache) if config.data.cache else folder / "cache",
        team.device,
        team,
        config.tokenizer,
        config.prediction_type,
    )
    if team.is_main:
        write_skipped(folder / "skipped.json", cache.skipped)
        for line in cache.notes:
            say(line)
    student = build_student(setup, _largest(cache))
    if team.is_main:
        say(f"{trained_parameters(student):,} parameters learn from {len(cache):,} pictures on {team.device}")
    prompts = preview_prompts(config, cache)
    distill(
        student,
        cache,
        setup.schedule,
        setup.info.prediction_type,
        config.method,
        config.training,
        folder / "run",
        config.data.caption_dropout,
        partial(save_preview, setup, student, prompts),
        team,
    )
    return setup, student, prompts


def begin(config: DistillConfig) -> Setup:
    """Check everything that can be checked before anything long begins, and write the run's `config.json`.

    Raises:
        InputError: the first thing that is wrong.
    """
    check(config)
    team = join_processes(choose_device(config.device or None))
    source = find_teacher(config.teacher)
    info = replace(source.info, prediction_type=config.prediction_type or source.info.prediction_type)
    setup = Setup(config, source, info, noise_schedule(info), team)
    check_method(config.method, setup.schedule, info.prediction_type)
    check_start(config)
    team.rows(config.training.batch_size, config.training.accumulation)
    if team.is_main:
        file = setup.folder / "config.json"
        if file.exists() and (setup.folder / "run" / "state.safetensors").exists():
            check_same_run(read_settings(file), to_dict(config), file)
        write_json(file, to_dict(config))
        several = {"processes": str(team.size)} if team.size > 1 else {}
        write_json(setup.folder / "run" / "machine.json", {**describe_machine(team.device), **several})
    team.wait()
    return setup


def check(config: DistillConfig) -> None:
    """Refuse settings that cannot be meant.

    Raises:
        InputError: names the first of them, and what it may be.
    """
    for name in ("teacher", "output"):
        if not getattr(config, name):
            raise InputError(f"no {name} was given; give --{name}, or --preset emoji to see how everything works")
    config.data.check()
    training, student = config.training, config.student
    ranges = {
        "steps": (training.steps, 1, 10**8),
        "batch_size": (training.batch_size, 1, 10**6),
        "accumulation": (training.accumulation, 1, 10**6),
        "learning_rate": (training.learning_rate, 1e-12, 1.0),
        "ema_decay": (training.ema_decay, 0.0, 1.0),
        "cooldown": (training.cooldown, 0.0, 1.0),
        "rank": (student.rank, 1, 4096),
        "preview_every": (config.report.preview_every, 0, 10**8),
        "samples": (config.report.samples, 0, 10**6),
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise InputError(f"{name} {value} is out of range; use {low} to {high}")
    if student.kind not in ("lora", "full"):
        raise InputError(f"unknown student {student.kind!r}; choose lora or full")
    if 0 < config.report.samples < 8:
        raise InputError(f"samples {config.report.samples} is too few for scores; use 8 or more, or 0 for no table")


def check_start(config: DistillConfig) -> None:
    """Refuse a start that is not there.

    Raises:
        InputError: says what was looked for.
    """
    start = config.student.start
    if not start:
        return
    if config.student.kind == "full":
        find_source(start)
    elif not Path(start).is_file():
        raise InputError(f"start {start} is not there; give the .safetensors file of an earlier LoRA, or leave it out")


def check_same_run(before: dict[str, Any], now: dict[str, Any], file: Path) -> None:
    """Refuse to continue a run with settings that would make it another one.

    Raises:
        InputError: names the setting with both its values.
    """
    for key, value in _flat(now).items():
        old = _flat(before).get(key, value)
        free = key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE
        if old != value and not free:
            raise InputError(
                f"{file} is of a run with {key} = {old!r}, not {value!r}; give that, or choose another output folder"
            )


def build_student(setup: Setup, size: tuple[int, int]) -> Student:
    """Load the teacher and make the student of it, for latents of this (height, width)."""
    config, device = setup.config, setup.processes.device
    component = read_component(setup.source.unet, "unet")
    count = sum(tensor.numel() for tensor in component.tensors.values())
    precision = choose_precision(device, config.student.precision, count)
    torch.manual_seed(config.training.seed)  # the first weights of what is added
    method = get_method(config.method)
    options = {"with_average": config.training.ema_decay > 0, "with_critic": method.needs_critic}

    def load_teacher() -> Any:
        unet = load_unet(component, device, precision, torch.contiguous_format)
        exact_output(unet)
        prepare_unet(unet, config.student, size)
        return unet

    if config.student.kind == "lora":
        unet = load_teacher()
        start = read_safetensors(config.student.start)[0] if config.student.start else None
        return lora_student(unet, unet_network(unet, precision), config.student, **options, start=start)
    unet = load_teacher() if method.needs_teacher else None
    teacher = None if unet is None else unet_network(unet, precision)
    student = full_student(component, teacher, config.student, precision, device, **options, start=read_start(config))
    for network in {student.trained, student.average, student.critic} - {None}:
        prepare_unet(network, config.student, size)
    return replace(student, teacher_unet=unet)


def read_start(config: DistillConfig) -> Component | None:
    """The U-Net that a full student starts from, if it is not the teacher's.

    Raises:
        InputError: an unknown or broken model.
    """
    name = config.student.start
    return read_component(find_source(name).unet, "unet") if name else None


def finish(setup: Setup, student: Student, prompts: Sequence[str]) -> None:
    """Weights, pictures, scores, card, workflow and report."""
    config, info, folder = setup.config, setup.info, setup.folder
    written = write_weights(config, student, setup.source, info)
    rows, remark = show_off(setup, student, prompts)
    write_json(folder / "results.json", {"rows": rows, "remark": remark})
    with painter(setup, student, "student") as model:
        written.append(write_workflow(config, info, model.resolution))
    written += [write_card(config, info, rows, remark), write_report(folder)]
    if rows:
        print(to_markdown(rows))
    print("\n".join(str(path) for path in written))


def say(line: str) -> None:
    """A note to whoever watches."""
    print(line, file=sys.stderr)


def _largest(cache: LatentCache) -> tuple[int, int]:
    """(height, width) of the largest latents."""
    sizes = [(int(height), int(width)) for height, _, width in (name.partition("x") for name in cache.buckets)]
    return max(sizes, key=lambda size: size[0] * size[1])


def _flat(settings: dict[str, Any], section: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{section}.{key}" if section else key
        flat |= _flat(value, name) if isinstance(value, dict) else {name: value}
    return flat
