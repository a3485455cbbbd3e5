"""One run of `distill`, from its settings to the files that it leaves in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lcm_core.families.network import FamilyNetwork
from lcm_core.files.checkpoint import Component, read_component
from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks.frozen import offload, quantise
from lcm_core.networks.lora_layers import TARGET_MODULES
from lcm_core.networks.unet import UNet, exact_output, load_unet
from lcm_core.pipeline.loras import merge_into_network
from lcm_core.pipeline.options import PictureOptions
from lcm_core.pipeline.parts import as_network, open_network
from lcm_core.pipeline.sources import find_source
from trainer.card import write_card
from trainer.checkpoints import check_back_to, go_back, save_checkpoint
from trainer.config import DistillConfig, StudentConfig
from trainer.control import check_guide, open_control
from trainer.data.cache import LatentCache, plan_cache, write_skipped
from trainer.discriminator import add_discriminator, has_discriminator
from trainer.distill import distill
from trainer.evaluate.style import kept, paint_references
from trainer.inputs import check_inputs
from trainer.lock import lock_folder
from trainer.methods.method import get_method
from trainer.outputs import guidance_of, recommended_of, write_weights, write_workflow
from trainer.report.page import write_report
from trainer.report.tables import to_markdown
from trainer.setup import Setup, begin, examine, say
from trainer.sharded import shard_student
from trainer.state import load_weights
from trainer.students import (
    Student,
    choose_precision,
    full_student,
    lora_student,
    prepare_network,
    prepare_unet,
    to_network,
    trained_parameters,
)
from trainer.validation import is_scored, paint_preview, painter, preview_prompts, save_preview, show_off


def run(config: DistillConfig) -> None:
    """Distil, from wherever an earlier run in the same folder stopped, and write everything that a run leaves.

    Raises:
        InputError: a setting, a file or a folder that cannot be used.
        KeyboardInterrupt: stopped; the state is saved.
    """
    setup = examine(config)
    with lock_folder(setup.folder, setup.processes.is_main):
        student, prompts = train(setup)
        if setup.processes.is_main:
            finish(setup, student, prompts)


def train(setup: Setup) -> tuple[Student, list[PictureOptions]]:
    """Distil, from wherever an earlier run in the same folder stopped. Returns also the prompts of its previews.

    Raises: as `run`.
    """
    if setup.config.back_to:
        check_back_to(setup.folder, setup.config.back_to)
    begin(setup)
    if setup.config.back_to and setup.processes.is_main:
        go_back(setup.folder, setup.config.back_to)
    config, processes, folder = setup.config, setup.processes, setup.folder
    place = Path(config.data.cache) if config.data.cache else folder / "cache"
    plan = plan_cache(config.data, setup.teacher, place, processes, config.prediction_type)
    if processes.is_main:
        check_inputs(setup, plan)
    cache = plan.fill(processes.device, processes)
    check_guide(config, setup.teacher, cache)
    if processes.is_main:
        write_skipped(folder / "skipped.json", cache.skipped)
        for line in cache.notes:
            say(line)
    if config.lora and processes.is_main and is_scored(config, setup.source):
        paint_references(setup, plan.captions)  # before the student takes memory
    student = build_student(setup, _largest(cache))
    if processes.is_main:
        say(f"{trained_parameters(student):,} trainable parameters, {len(cache):,} pictures, on {processes.device}")
    sharded = config.student.sharded and processes.size > 1
    if sharded:
        shard_student(student, processes)
    prompts = preview_prompts(config, cache)
    preview = partial(paint_preview, setup, student, prompts) if config.report.preview_every else None

    def watch(step: int, loss: float) -> None:
        save_preview(setup, student, prompts, step, loss)
        save_checkpoint(setup, student, cache, preview, step, loss)

    distill(
        student,
        cache,
        setup.diffusion,
        config.method,
        config.training,
        folder / "run",
        config.data.caption_dropout,
        watch,
        processes,
    )
    if sharded and processes.is_main:  # which alone writes and paints, for which it needs all of the weights
        student = build_student(setup, _largest(cache))
        load_weights(folder / "run", student.trained, student.average)
    return student, prompts


def build_student(setup: Setup, size: tuple[int, int]) -> Student:
    """Load the teacher and make the student of it, for latents of this (height, width)."""
    config, device = setup.config, setup.processes.device
    component = read_component(setup.source.unet, "unet")
    count = sum(tensor.numel() for tensor in component.tensors.values())
    precision = choose_precision(device, config.student.precision, count, scales_loss=True)
    student = _build_student(setup, component, precision, size)
    if has_discriminator(config.method):
        student = add_discriminator(student)
    return replace(student, scales_loss=precision == torch.float16)


def _build_student(setup: Setup, component: Component, precision: torch.dtype, size: tuple[int, int]) -> Student:
    config, device = setup.config, setup.processes.device
    torch.manual_seed(config.training.seed)  # the first weights of what is added
    method, family, put_on = get_method(config.method), setup.source.family, open_control(config, setup.source)
    options: dict[str, Any] = {"with_average": config.training.ema_decay > 0, "with_critic": method.needs_critic}

    def load_teacher() -> UNet | FamilyNetwork:
        place = _loading_device(config.student, device)
        if family is None:
            call: UNet | FamilyNetwork = UNet(load_unet(component, place, precision, torch.contiguous_format))
            exact_output(call.model)
        else:
            call = open_network(setup.source, place, precision)
        merge_into_network(call, setup.teacher.loras)
        if config.student.base_dtype:
            quantise(call.model, config.student.base_dtype, place if config.student.offload else device)
        if config.student.offload:
            offload(call.model, device)
        if config.student.base_dtype or config.student.offload:
            call = as_network(setup.source, call.model)
        prepare(call.model)
        return call

    def prepare(network: Any) -> None:
        if family is None or family.folder == "unet":
            prepare_unet(network, config.student, size)
        else:
            prepare_network(network, config.student)

    if config.student.kind == "lora":
        call = load_teacher()
        options["start"] = read_safetensors(config.student.start)[0] if config.student.start else None
        options["targets"] = TARGET_MODULES if family is None else family.lora_targets
        options["reads_guidance"] = call.reads_guidance
        return lora_student(call.model, to_network(put_on(call), precision), config.student, **options)
    teacher = load_teacher() if method.needs_teacher else None
    asked = None if teacher is None else to_network(put_on(teacher), precision)
    options |= {"start": read_start(config), "source": setup.source, "with_end": method.needs_end, "put_on": put_on}
    student = full_student(component, asked, config.student, precision, device, **options)
    for network in {student.trained, student.average, student.critic} - {None}:
        prepare(network)
    return replace(student, teacher_unet=None if teacher is None else teacher.model)


def _loading_device(config: StudentConfig, device: torch.device) -> torch.device:
    """Where a network is loaded: what is to be quantised may not fit on the device before that, and what is to rest in
    main memory never."""
    return torch.device("cpu") if config.base_dtype or config.offload else device


def read_start(config: DistillConfig) -> Component | None:
    """The U-Net that a full student starts from, if it is not the teacher's.

    Raises:
        InputError: an unknown or broken model.
    """
    name = config.student.start
    return read_component(find_source(name).unet, "unet") if name else None


def finish(setup: Setup, student: Student, prompts: Sequence[PictureOptions]) -> None:
    """Weights, pictures, scores, card, workflow and report."""
    config, info, folder = setup.config, setup.info, setup.folder
    written = write_weights(config, student, setup.source, info)
    scores = show_off(setup, student, prompts, written[0])
    if setup.source.family is None and not get_method(config.method).needs_end:
        with painter(setup, student, "student") as model:
            written.append(write_workflow(config, info, model.resolution))
    said = recommended_of(config, setup.source, info)
    if student.reads_guidance:  # which the file does not say, as programs would take it for CFG
        said = replace(said, guidance_scale=guidance_of(config.method, setup.source))
    written += [write_card(config, info, said, scores.rows, scores.remark), write_report(folder)]
    if scores.rows:
        print(to_markdown(scores.rows))
    if words := kept(scores.rows):
        print(words)
    print("\n".join(str(path) for path in written))


def _largest(cache: LatentCache) -> tuple[int, int]:
    """(height, width) of the largest latents."""
    sizes = [(int(height), int(width)) for height, _, width in (name.partition("x") for name in cache.buckets)]
    return max(sizes, key=lambda size: size[0] * size[1])
