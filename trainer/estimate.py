"""The plan of a run, for `--dry-run`: how much memory, disk and time it will take.

Memory comes from a rehearsal of one step (`trainer.memory`), disk from the shapes of what will be written, time from
what was measured when a part of this run's cache, steps and scores was made; without any, that of a U-Net's training is
guessed (`trainer.speed`), the rest said to be unknown.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lcm_core.files.checkpoint import read_component
from lcm_core.files.safetensors import read_json
from lcm_core.networks.device import choose_device, explained
from lcm_core.pipeline.sources import ModelSource
from trainer.config import DistillConfig
from trainer.data.cache import LatentCache, open_data, plan_cache
from trainer.data.hashing import FileHashes
from trainer.data.index import find_index
from trainer.data.remote import find_remote, is_remote
from trainer.data.teacher import Teacher
from trainer.discriminator import head_weights
from trainer.disk import cache_size, count_weights, encoders, result_size, state_size, trained_networks
from trainer.distributed import Processes
from trainer.estimate_flow import flow_memory
from trainer.estimate_unet import LIBRARIES, unet_memory
from trainer.inputs import check_inputs
from trainer.memory import rehearsal
from trainer.report.page import read_log
from trainer.report.sections import duration, size
from trainer.scores import Scores, shown_steps
from trainer.setup import examine, notes, say, teacher_of
from trainer.state import has_state
from trainer.validation import is_scored

GUESSED = "training, a rough guess from its operations"
"""Name of the time of training as long as no step was measured."""


@dataclass
class Plan:
    """What a run will need. Every part is in bytes."""

    memory: dict[str, int] = field(default_factory=dict)
    """While training, by what it is for; on the accelerator, or of main memory on a CPU. They add up to the peak."""
    caching_memory: int = 0
    """Peak while latents and text embeddings are computed, before the training."""
    disk: dict[str, int] = field(default_factory=dict)
    """What will lie in the output folder."""
    facts: dict[str, str] = field(default_factory=dict)
    """What the run will do, in words."""
    seconds: dict[str, float | None] = field(default_factory=dict)
    """The seconds that each part will take from here on; None where nothing like it has been measured yet."""
    resting: int = 0
    """Main memory for weights that are copied to the accelerator when they are needed."""


def print_plan(config: DistillConfig) -> None:
    """Check all that a run would check, and print its plan; see `make_plan`."""
    setup = examine(config)
    if setup.processes.is_main and has_state(setup.folder / "run"):
        plan = plan_cache(config.data, setup.teacher, _cache(config), Processes(), config.prediction_type)
        check_inputs(setup, plan, remember=False)
    if setup.processes.is_main:
        for line in notes(config):
            say(f"note: {line}")
        print(to_text(make_plan(config, setup.processes)))


def make_plan(config: DistillConfig, processes: Processes | None = None) -> Plan:
    """Estimate what a run needs, without loading a network.

    Args:
        config: the run's settings.
        processes: the processes that will share the work; None for one, on the chosen device.

    Raises:
        InputError: a teacher or data that cannot be used.
    """
    processes = processes or Processes(choose_device(config.device or None))
    teacher = teacher_of(config)
    unet = read_component(teacher.source.unet, "unet")
    side = (config.data.resolution or teacher.resolution) // teacher.scale
    pictures, captions, data = _count_data(config, teacher)
    is_flow = teacher.source.family is not None
    if is_flow:
        memory, trained, resting = flow_memory(config, processes, teacher, trained_networks(config))
        guess = None
    else:
        memory, trained, guess, resting = unet_memory(config, processes, unet, side)
    measured = training_left(config)
    training = {"training": measured} if measured is not None or guess is None else {GUESSED: guess}
    return Plan(
        facts={
            "teacher": f"{config.teacher} ({teacher.source.info.family}), {count_weights(unet):,} weights",
            "student": f"{config.student.kind}, {trained:,} trainable parameters, on {processes.device}",
            "data": f"{data} of about {side * teacher.scale} x {side * teacher.scale} pixels",
            "training": f"{config.training.steps:,} steps of {config.training.batch_size}",
        },
        memory=memory,
        caching_memory=0
        if is_flow
        else _caching_memory(teacher.source, processes.device, side * teacher.scale, config.data.cache_batch),
        disk={
            "cache": cache_size(teacher, pictures, captions, side, bool(config.data.control_pictures)),
            "state": state_size(config, trained, head_weights(config.method, unet.config)),
            "result": result_size(config, teacher.source, unet, trained),
        },
        seconds={
            "caching": caching_left(config, pictures, captions) if pictures else None,
            **training,
            "scoring": scoring_left(config) if is_scored(config, teacher.source) else 0.0,
        },
        resting=resting,
    )


def to_text(plan: Plan) -> str:
    """The plan as lines for a terminal."""
    memory, disk = sum(plan.memory.values()), sum(plan.disk.values())
    lines = [f"{name:<12}{value}" for name, value in plan.facts.items()]
    lines.append(f"{'memory':<12}{size(max(memory, plan.caching_memory))} at the peak")
    lines += [f"  {size(value):>10}  {name}" for name, value in plan.memory.items()]
    if plan.caching_memory:
        lines.append(f"  {size(plan.caching_memory):>10}  before that, while the cache is made")
    if plan.resting:
        lines.append(f"  {size(plan.resting):>10}  of main memory beside that, for weights that rest there")
    lines.append(f"{'disk':<12}{size(disk)}")
    lines += [f"  {size(value):>10}  {name}" for name, value in plan.disk.items()]
    known = [seconds for seconds in plan.seconds.values() if seconds is not None]
    total = f"about {duration(sum(known))} from here on" if known else "unknown"
    missing = "" if len(known) == len(plan.seconds) else "; start, stop after a minute, and ask again for the rest"
    lines.append(f"{'time':<12}{total}{missing}")
    for name, seconds in plan.seconds.items():
        lines.append(f"  {'unknown' if seconds is None else duration(seconds):>10}  {name}")
    return "\n".join(lines)


def _count_data(config: DistillConfig, teacher: Teacher) -> tuple[int, int, str]:
    """Pictures, all variants counted, and versions of captions, none where these are not known yet; and in words."""
    if is_remote(config.data.path):
        tars = find_remote(config.data.path)
        total = size(sum(tar.size or 0 for tar in tars))
        return 0, 0, f"{len(tars):,} tars, {total}, of pictures that are counted while they are read,"
    if config.data.path and (index := find_index(Path(config.data.path))) is not None:
        cache = LatentCache(index, checked=True)
        return len(cache), cache.caption_count * int(cache.about["versions"]), f"{len(cache):,} pictures"
    data = open_data(config.data, teacher, FileHashes(_cache(config) / "files.json"), config.prediction_type)
    each = 1 if config.data.is_image_free else config.data.variant_count
    count = len(data.captions) * each
    return count, len(set(data.captions)) * config.data.caption_versions, f"{count:,} pictures"


def _caching_memory(source: ModelSource, device: torch.device, side: int, batch: int) -> int:
    """Text encoders, then the VAE, which are loaded one after the other."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    text = sum(4 * count_weights(read_component(source.text, name)) for name in encoders(source))
    config = read_component(source.vae, "vae").config
    kind = AutoencoderTiny if config.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
    with explained(str(source.vae)), rehearsal(device) as memory, torch.no_grad():
        kind.from_config(config).encode(torch.empty(batch, 3, side, side))
    return max(text, memory.peak) + (LIBRARIES if device.type == "cpu" else 0)


def caching_left(config: DistillConfig, pictures: int, captions: int) -> float | None:
    """Seconds for what the cache has not yet, by what a picture and a caption took; None where none was made."""
    total = 0.0
    for kind, count in (("latents", pictures), ("text", captions + 1)):
        newest = max(_cache(config).glob(f"{kind}-*/speed.json"), key=lambda file: file.stat().st_mtime, default=None)
        if newest is None:
            return None
        made = len(list(newest.parent.glob("*.safetensors"))) * config.data.shard_size
        total += max(0, count - made) * float(read_json(newest).get("seconds", 0.0))
    return total


def training_left(config: DistillConfig) -> float | None:
    """Seconds for the steps that are left, by the median step of this run so far."""
    seconds = _step_seconds(config)
    if not seconds:
        return None
    return statistics.median(seconds) * max(0, config.training.steps - len(seconds))


def scoring_left(config: DistillConfig) -> float | None:
    """Seconds for the rows of the table that are left: by the rows that were made, else by the steps of training."""
    samples, rows = config.report.samples, Scores.read(Path(config.output)).rows
    # calls of the network for one picture, of which a teacher needs two for each step
    calls = {("teacher", steps): 2 * steps for steps in shown_steps("teacher")}
    calls |= {("student", steps): steps for steps in shown_steps("student")}
    done = {(str(row.get("role")), int(row["steps"])): 1 / row["images_per_second"] for row in rows}
    left = samples * sum(number for row, number in calls.items() if row not in done)
    paid = sum(calls.get(row, 0) for row in done)
    if paid:
        return left * sum(done.values()) / paid
    seconds = _step_seconds(config)
    if not seconds:
        return None
    # of one sample: the teacher with and without the prompt, target, student, and its backward pass twice that
    return left * statistics.median(seconds) / (6 * config.training.batch_size)


def _step_seconds(config: DistillConfig) -> list[float]:
    return [float(line["seconds"]) for line in read_log(Path(config.output) / "run" / "log.jsonl")]


def _cache(config: DistillConfig) -> Path:
    return Path(config.data.cache or Path(config.output, "cache"))
