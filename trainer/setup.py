"""What a run finds out and checks before anything long begins; `--dry-run` checks the same."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lcm_core.cli.common import check_output, parse_lora
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
from lcm_core.files.checkpoint import ModelInfo, read_component
from lcm_core.files.safetensors import write_json
from lcm_core.networks.device import choose_device
from lcm_core.networks.frozen import check_format
from lcm_core.pipeline.model import diffusion_of
from lcm_core.pipeline.sources import ModelSource, find_source
from trainer.config import DistillConfig, StudentConfig
from trainer.continuing import SETTINGS, changes, check_same_run, earlier_settings
from trainer.control import check_control
from trainer.data.teacher import Teacher, find_teacher
from trainer.discriminator import check_discriminator
from trainer.distill import for_method
from trainer.distributed import Processes, join_processes
from trainer.loop import check_optimizer
from trainer.machine import describe_machine
from trainer.methods.method import get_method
from trainer.options import describe_run, to_dict
from trainer.progress import check_trackers
from trainer.ranges import check_ranges
from trainer.report.prompts import read_prompts
from trainer.sharded import check_sharded
from trainer.starts import check_flow_map, check_lora_start
from trainer.students import check_compile, check_same_layers, choose_precision


@dataclass(frozen=True)
class Setup:
    """What a run has found out before it trains."""

    config: DistillConfig
    source: ModelSource
    info: ModelInfo
    diffusion: Diffusion
    processes: Processes

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.config.output)

    @property
    def teacher(self) -> Teacher:
        """What the cache has to know of it."""
        return teacher_of(self.config)


def teacher_of(config: DistillConfig) -> Teacher:
    """What a run's settings say of its teacher."""
    vae, control = config.vae or None, parse_lora(config.control)[0]
    return Teacher(config.teacher, config.tokenizer or None, vae, config.clip_skip, control, config.lora)


def examine(config: DistillConfig) -> Setup:
    """Check everything that can be checked before anything long begins; nothing is written.

    Raises:
        InputError: the first thing that is wrong.
    """
    check(config)
    check_output(Path(config.output) / SETTINGS)
    processes = join_processes(choose_device(config.device or None))
    source = find_teacher(config.teacher)
    info = replace(source.info, prediction_type=config.prediction_type or source.info.prediction_type)
    if source.family is not None:
        check_family(config, source)
        info = replace(info, shift=config.shift or Teacher(config.teacher).shift(config.data.resolution))
    setup = Setup(config, source, info, for_method(diffusion_of(info), config.method), processes)
    if config.lora and config.student.kind == "full":
        raise InputError(
            "a full student does not go with lora; merge that first, with python -m lcm_core export --to diffusers "
            "--lora PATH, and give the merged model as the teacher"
        )
    check_control(config, setup.teacher)
    check_flow_map(config, source)
    check_start(config, source)
    check_optimizer(config.training)
    check_trackers(config.training.trackers)
    check_compile(config.student, processes.device)
    check_base_dtype(config.student)
    check_offload(config.student, processes.device)
    check_sharded(config)
    processes.rows(config.training.batch_size, config.training.accumulation)
    weights = read_component(source.unet, "unet").tensors.values()
    count = sum(tensor.numel() for tensor in weights)
    precision = choose_precision(processes.device, config.student.precision, count, scales_loss=True)
    check_discriminator(config, source, precision)
    setup.teacher.check_parts()
    if before := earlier_settings(setup.folder):
        check_same_run(before, to_dict(config), setup.folder / SETTINGS)
    return setup


def check_family(config: DistillConfig, source: ModelSource) -> None:
    """Refuse what is for other models than those of a family.

    Raises:
        InputError: names it.
    """
    is_flow = source.info.prediction_type == "flow"
    if config.student.start and config.student.kind == "lora":
        raise InputError(f"the start of a LoRA is for Stable Diffusion's U-Nets, not for {source.root}; leave it out")
    if not is_flow and config.shift:
        raise InputError(f"shift is for flow models; {source.root} is none, leave it out")
    if not is_flow:
        return
    if config.student.kind == "full":
        raise InputError(f"student full is for U-Nets; {source.root} is a transformer, give --student lora")
    if config.prediction_type not in ("", "flow"):
        raise InputError(
            f"prediction_type {config.prediction_type} does not go with a flow process, and {source.root} is a flow "
            "model; leave it out"
        )
    check_ranges(config, {"shift": (0.0, 1000.0)})


def check_base_dtype(config: StudentConfig) -> None:
    """Refuse a format of the frozen weights that is not here, and one for a full student, which trains its weights.

    Raises:
        InputError: says what to choose.
    """
    if not config.base_dtype:
        return
    check_format(config.base_dtype)
    if config.kind != "lora":
        raise InputError(f"base_dtype {config.base_dtype} is for the frozen weights under a LoRA; leave it out")


def check_offload(config: StudentConfig, device: torch.device) -> None:
    """Refuse to keep weights in main memory where there is no other, where they are trained, and with what does not go
    with it.

    Raises:
        InputError: says what to leave out.
    """
    if not config.offload:
        return
    if device.type != "cuda":
        raise InputError(f"offload is for CUDA: on {device} the weights are in main memory anyway; leave it out")
    if config.kind != "lora":
        raise InputError("offload is for the frozen weights under a LoRA, and a full student trains all; leave it out")
    if config.base_dtype == "nf4":
        raise InputError("offload does not go with base_dtype nf4; choose int8 or fp8")
    if config.compile:
        raise InputError("compile does not go with offload; leave one of them out")


def begin(setup: Setup) -> None:
    """Write the run's `config.json`, and tell what the user should know.

    Raises:
        InputError: the folder cannot be written.
    """
    config, processes, run = setup.config, setup.processes, setup.folder / "run"
    if processes.is_main:
        for line in [*notes(config), *changes(setup.folder, config)]:
            say(f"note: {line}")
        kept = replace(config, accept_changes=False, back_to=0)
        write_json(setup.folder / SETTINGS, to_dict(kept))
        with atomic_write(setup.folder / "run.toml") as temporary:
            temporary.write_text(describe_run(kept), encoding="utf-8", errors="backslashreplace")
        several = {"processes": str(processes.size)} if processes.size > 1 else {}
        write_json(run / "machine.json", {**describe_machine(processes.device), **several})
    processes.wait()


def check(config: DistillConfig) -> None:
    """Refuse settings that cannot be meant. Those of the method were checked when they were made.

    Raises:
        InputError: names the first of them, and what it may be.
    """
    for name in ("teacher", "output"):
        if not getattr(config, name):
            raise InputError(f"no {name} was given; give --{name}, or --preset emoji to see how everything works")
    config.data.check()
    check_ranges(
        config.training,
        {
            "steps": (1, 10**8),
            "batch_size": (1, 10**6),
            "learning_rate": (1e-12, 1.0),
            "warmup_steps": (0, 10**8),
            "cooldown": (0.0, 1.0),
            "weight_decay": (0.0, 1000.0),
            "adam_beta2": (0.5, 0.99999),
            "max_grad_norm": (1e-9, 1e9),
            "ema_decay": (0.0, 1.0),
            "seed": (0, 2**40),
            "save_every": (0.0, 1e9),
            "checkpoint_every": (0, 10**8),
            "keep_checkpoints": (0, 10**6),
            "accumulation": (1, 10**6),
        },
    )
    if config.student.kind not in ("lora", "full"):
        raise InputError(f"unknown student {config.student.kind!r}; choose lora or full")
    ranges = {"rank": (1, 4096), "alpha": (0.0, 1e6), "guidance_embedding_dim": (2, 65536)}
    check_ranges(config.student, ranges)
    ranges = {"preview_every": (0, 10**8), "preview_steps": (1, 1000), "samples": (0, 10**6)}
    check_ranges(config.report, ranges)
    if config.data.holdout and get_method(config.method).needs_critic:
        raise InputError(
            f"the loss of {config.method.kind} does not say how good a student is, so that holding pictures out is of "
            "no use; leave holdout out"
        )
    if config.data.holdout and not config.training.checkpoint_every:
        raise InputError("holdout is for choosing among checkpoints; add --checkpoint-every, or leave holdout out")
    read_prompts(config.report.preview_prompts)
    if 0 < config.report.samples < 8:
        raise InputError(f"samples {config.report.samples} is too few for scores; use 8 or more, or 0 for no table")


def notes(config: DistillConfig) -> list[str]:
    """What the user should know about settings that are allowed but seldom meant, one line each."""
    method, lines = config.method, list[str]()
    if config.student.kind == "lora" and method.w_min != method.w_max:
        lines.append(
            f"a LoRA cannot read the guidance w, so this one learns a mixture of w {method.w_min:g} to "
            f"{method.w_max:g}; give one value to --w-min and --w-max, as the presets for LoRAs do"
        )
    if config.control and (config.report.samples or config.report.preview_every):
        lines.append("previews and scores are painted without the control")
    return lines


def check_start(config: DistillConfig, teacher: ModelSource) -> None:
    """Refuse a start that is not there, or of another shape than the student.

    Raises:
        InputError: says what was looked for, or where it differs.
    """
    start = config.student.start
    if not start:
        return
    unet = read_component(teacher.unet, "unet")
    if config.student.kind == "full":
        check_same_layers(read_component(find_source(start).unet, "unet"), unet)
    elif Path(start).is_file():
        check_lora_start(Path(start), unet, config.student)
    else:
        raise InputError(f"start {start} is not there; give the .safetensors file of an earlier LoRA, or leave it out")


def say(line: str) -> None:
    """A note to whoever watches."""
    print(line, file=sys.stderr)
