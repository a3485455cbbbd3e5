"""One run of `distill`, from its settings to the files that it leaves in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lcm_core.families.network import Transformer
from lcm_core.files.checkpoint import Component, read_component
from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks.unet import exact_output, load_unet
from lcm_core.pipeline.options import PictureOptions
from lcm_core.pipeline.parts import open_network
from lcm_core.pipeline.sources import ModelSource, find_source
from trainer.config import DistillConfig, StudentConfig
from trainer.data.cache import LatentCache, plan_cache, write_skipped
from trainer.distill import distill
from trainer.inputs import check_inputs
from trainer.lock import lock_folder
from trainer.methods.method import get_method
from trainer.outputs import write_card, write_weights, write_workflow
from trainer.report.page import write_report
from trainer.report.tables import to_markdown
from trainer.setup import Setup, begin, examine, say
from trainer.students import (
    Student,
    choose_precision,
    full_student,
    lora_student,
    prepare_network,
    prepare_unet,
    to_network,
    trained_parameters,
    unet_network,
)
from trainer.validation import painter, preview_prompts, save_preview, show_off


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
    begin(setup)
    config, processes, folder = setup.config, setup.processes, setup.folder
    place = Path(config.data.cache) if config.data.cache else folder / "cache"
    plan = plan_cache(config.data, setup.teacher, place, processes, config.prediction_type)
    if processes.is_main:
        check_inputs(setup, plan)
    cache = plan.fill(processes.device, processes)
    if processes.is_main:
        write_skipped(folder / "skipped.json", cache.skipped)
        for line in cache.notes:
            say(line)
    student = build_student(setup, _largest(cache))
    if processes.is_main:
        say(f"{trained_parameters(student):,} trainable parameters, {len(cache):,} pictures, on {processes.device}")
    prompts = preview_prompts(config, cache)
    distill(
        student,
        cache,
        setup.diffusion,
        config.method,
        config.training,
        folder / "run",
        config.data.caption_dropout,
        partial(save_preview, setup, student, prompts),
        processes,
    )
    return student, prompts


def build_student(setup: Setup, size: tuple[int, int]) -> Student:
    """Load the teacher and make the student of it, for latents of this (height, width)."""
    config, device = setup.config, setup.processes.device
    component = read_component(setup.source.unet, "unet")
    count = sum(tensor.numel() for tensor in component.tensors.values())
    precision = choose_precision(device, config.student.precision, count)
    torch.manual_seed(config.training.seed)  # the first weights of what is added
    method = get_method(config.method)
    options: dict[str, Any] = {"with_average": config.training.ema_decay > 0, "with_critic": method.needs_critic}

    def load_teacher() -> Any:
        unet = load_unet(component, device, precision, torch.contiguous_format)
        exact_output(unet)
        prepare_unet(unet, config.student, size)
        return unet

    if setup.source.family is not None:
        return transformer_student(setup.source, config.student, device, precision, **options)

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


def transformer_student(
    source: ModelSource, config: StudentConfig, device: torch.device, precision: torch.dtype, **options: Any
) -> Student:
    """A LoRA on the network of a flow model."""
    call = open_network(source, device, precision)
    assert isinstance(call, Transformer)
    prepare_network(call.model, config)
    targets = call.family.lora_targets
    network = to_network(call, precision)
    return lora_student(call.model, network, config, **options, targets=targets, reads_guidance=call.reads_guidance)


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
    if setup.source.family is None:
        with painter(setup, student, "student") as model:
            written.append(write_workflow(config, info, model.resolution))
    written += [write_card(config, info, scores.rows, scores.remark), write_report(folder)]
    if scores.rows:
        print(to_markdown(scores.rows))
    print("\n".join(str(path) for path in written))


def _largest(cache: LatentCache) -> tuple[int, int]:
    """(height, width) of the largest latents."""
    sizes = [(int(height), int(width)) for height, _, width in (name.partition("x") for name in cache.buckets)]
    return max(sizes, key=lambda size: size[0] * size[1])
