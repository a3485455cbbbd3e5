"""What a finished run leaves: files that every program loads, and a ComfyUI workflow that uses them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lcm_core.diffusion.flow_map import END_KEY
from lcm_core.families.labels import INDEX
from lcm_core.files.atomic import new_folder
from lcm_core.files.checkpoint import (
    Component,
    ModelInfo,
    list_components,
    read_component,
    save_component,
    save_diffusers,
    save_single_file,
    scheduler_config,
)
from lcm_core.files.lora import save_lora
from lcm_core.files.recommended import FULL_LCM_GUIDANCE, Recommended
from lcm_core.files.safetensors import DIFFUSERS_WEIGHTS, read_json, write_json, write_safetensors
from lcm_core.networks.lora_layers import lora_state_dict, transformer_lora_state_dict
from lcm_core.pipeline.sources import ModelSource
from trainer.config import DistillConfig
from trainer.methods.config import MethodConfig
from trainer.methods.method import sampling_of
from trainer.options import to_dict
from trainer.setup import say, teacher_of
from trainer.starts import plain_config
from trainer.students import Student
from trainer.whole import join_style

DISTILL_KEY = "lcm_suite.distill"
"""Safetensors metadata: JSON of the settings that the weights were trained with."""
_CLIP_WORDS = 49408  # a tokenizer of another size is the model's own and must travel with it
_STORED = torch.float16


def run_name(config: DistillConfig) -> str:
    """Name of the files that come out."""
    return config.name or Path(config.output).resolve().name


def write_weights(
    config: DistillConfig, student: Student, source: ModelSource, info: ModelInfo, folder: Path | None = None
) -> list[Path]:
    """Write the result: a LoRA in kohya's layout; or the whole model, as a diffusers folder and as one file, a flow map
    as a folder alone.

    Args:
        config, student, source, info: of the run.
        folder: where; None for the run's own.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    folder, name, family = folder or Path(config.output), run_name(config), source.family
    recommended = recommended_of(config, source, info)
    metadata = {**recommended.metadata(), DISTILL_KEY: json.dumps(to_dict(config)), "modelspec.title": name}
    if student.adapters is not None:
        which: dict[str, Any] = {"ema": student.final == "ema", "dtype": _STORED}
        if family is None:
            tensors = lora_state_dict(student.unet, **which)
        else:
            tensors = transformer_lora_state_dict(student.unet, family.lora_names, **which, folder=family.folder)
        files = {folder / f"{name}_lora.safetensors": tensors}
        if config.lora:
            whole, note = join_style(tensors, teacher_of(config), config.student.rank, _STORED)
            files = {folder / f"{name}_lora.safetensors": whole, folder / f"{name}_patch.safetensors": tensors}
            if note:
                say(f"note: {note}")
        for file, content in files.items():
            if family is None:
                save_lora(file, content, info.family, metadata)
            else:
                write_safetensors(file, content, metadata)
        return list(files)
    if family is not None:
        return _write_class_folder(folder / "diffusers", student, source, info, recommended, config.vae)
    components = read_parts(source, config.vae) | {"unet": _unet_component(student)}
    if END_KEY in components["unet"].config:  # no other program could run it, so that no file pretends so
        _write_folder(folder / "diffusers", components, info, source, recommended)
        return [folder / "diffusers" / "unet" / DIFFUSERS_WEIGHTS, folder / "diffusers"]
    _write_file(folder / f"{name}.safetensors", components, info, source, metadata)
    _write_folder(folder / "diffusers", components, info, source, recommended)
    return [folder / f"{name}.safetensors", folder / "diffusers"]


def recommended_of(config: DistillConfig, source: ModelSource, info: ModelInfo) -> Recommended:
    """How a student wants to be sampled; of a flow model with its shift, and a full one with its guidance scale."""
    said = sampling_of(config.method)
    if config.student.kind == "full":
        said = replace(said, guidance_scale=guidance_of(config.method, source))
    return replace(said, shift=info.shift) if info.prediction_type == "flow" else said


def guidance_of(method: MethodConfig, source: ModelSource) -> float:
    """The guidance scale of a student that reads it: what the teacher is used with, or else what is usual, as near as
    what was learnt comes to it."""
    usual = source.recommended.teacher_guidance_scale or FULL_LCM_GUIDANCE
    return min(max(usual, 1 + method.w_min), 1 + method.w_max)


def read_parts(source: ModelSource, vae: str = "") -> dict[str, Component]:
    """All networks of a model but its U-Net, as stored; the VAE is another one's where that is given."""
    parts = {"vae": read_component(vae or source.vae, "vae")}
    names = [name for name in list_components(source.text) if name.startswith("text_encoder")] or ["text_encoder"]
    return parts | {name: read_component(source.text, name) for name in names}


def _unet_component(student: Student) -> Component:
    network: Any = student.trained if student.average is None else student.average
    tensors = {name: tensor.detach().to(_STORED) for name, tensor in network.state_dict().items()}
    return Component(tensors, plain_config({**network.config, "_class_name": type(network).__name__}))


def _write_folder(
    folder: Path, components: Mapping[str, Component], info: ModelInfo, source: ModelSource, recommended: Recommended
) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of this run, before more steps were asked for
    with new_folder(folder) as temporary:
        save_diffusers(temporary, components, info, recommended)
        for name, files in source.read_tokenizers().items():
            (temporary / name).mkdir()
            for file, text in files.items():
                (temporary / name / file).write_text(text, encoding="utf-8")


def _write_class_folder(
    folder: Path, student: Student, source: ModelSource, info: ModelInfo, recommended: Recommended, vae: str
) -> list[Path]:
    """A class-conditional model, with the index and its names of the classes as the teacher has them."""
    assert source.family is not None
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as temporary:
        save_component(temporary / source.family.folder, _unet_component(student))
        save_component(temporary / "vae", read_component(vae or source.vae, "vae"))
        write_json(temporary / "scheduler" / "scheduler_config.json", scheduler_config(info, recommended))
        write_json(temporary / INDEX, read_json(source.root / INDEX) if (source.root / INDEX).is_file() else {})
    return [folder / source.family.folder / DIFFUSERS_WEIGHTS, folder]


def _write_file(
    file: Path, components: Mapping[str, Component], info: ModelInfo, source: ModelSource, metadata: Mapping[str, str]
) -> None:
    own_words = components["text_encoder"].config.get("vocab_size") != _CLIP_WORDS
    words = source.read_tokenizers().get("tokenizer") if own_words else None
    save_single_file(file, components, info, words, metadata)


def comfyui_workflow(config: DistillConfig, info: ModelInfo, resolution: int) -> dict[str, Any]:
    """A workflow in ComfyUI's API format, which can be dropped on its page; with nodes that it has itself, as far as it
    has the sampler."""
    is_lora = config.student.kind == "lora"
    name = run_name(config)
    checkpoint = f"{Path(config.teacher).stem}.safetensors" if is_lora else f"{name}.safetensors"
    graph: dict[str, Any] = {"checkpoint": _node("CheckpointLoaderSimple", ckpt_name=checkpoint)}
    model = ["checkpoint", 0]
    if is_lora:
        lora = {"lora_name": f"{name}_lora.safetensors", "strength_model": 1.0}
        graph["lora"] = _node("LoraLoaderModelOnly", model=model, **lora)
        model = ["lora", 0]
    size = {"width": resolution, "height": resolution, "batch_size": 1}
    graph |= {
        "positive": _node("CLIPTextEncode", text="a photograph of an old lighthouse", clip=["checkpoint", 1]),
        "negative": _node("CLIPTextEncode", text="", clip=["checkpoint", 1]),
        "latent": _node("EmptyLatentImage", **size),
    }
    texts = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    is_tcd = sampling_of(config.method).sampler == "tcd"
    sampling = _tcd_nodes(config.method, model, texts) if is_tcd else _lcm_nodes(info, model, texts)
    return {
        **graph,
        **sampling,
        "decode": _node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix=name),
    }


def _lcm_nodes(info: ModelInfo, model: list[Any], texts: Mapping[str, Any]) -> dict[str, Any]:
    # ComfyUI's "lcm" takes the network's output for noise, so another kind of prediction must be named instead.
    kind = {"epsilon": "lcm", "v_prediction": "v_prediction", "sample": "x0"}[info.prediction_type]
    options = {"seed": 0, "steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple", "denoise": 1.0}
    return {
        "sampling": _node("ModelSamplingDiscrete", model=model, sampling=kind, zsnr=info.zero_terminal_snr),
        "sampler": _node("KSampler", model=["sampling", 0], **texts, **options),
    }


def _tcd_nodes(config: MethodConfig, model: list[Any], texts: Mapping[str, Any]) -> dict[str, Any]:
    """TCD's sampler is this suite's own."""
    recommended, original_steps = sampling_of(config), config.original_steps
    grid = {"steps": recommended.steps, "strength": 1.0, "original_steps": original_steps, "timesteps": ""}
    places = {"model": ["sampling", 0], "sampler": ["method", 0], "sigmas": ["steps", 0]}
    return {
        "sampling": _node("LCMApply", model=model, guidance_scale=0.0, original_steps=original_steps),
        "method": _node("LCMSampler", sampler="tcd", gamma=recommended.gamma),
        "steps": _node("LCMScheduler", model=["sampling", 0], **grid),
        "sampler": _node("SamplerCustom", **places, **texts, add_noise=True, noise_seed=0, cfg=1.0),
    }


def write_workflow(config: DistillConfig, info: ModelInfo, resolution: int) -> Path:
    """Write `workflow_comfyui.json`."""
    file = Path(config.output) / "workflow_comfyui.json"
    graph = comfyui_workflow(config, info, resolution)
    numbers = {name: str(number) for number, name in enumerate(graph, 1)}
    write_json(file, {numbers[name]: _renumbered(node, numbers) for name, node in graph.items()})
    return file


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _renumbered(node: Mapping[str, Any], numbers: Mapping[str, str]) -> dict[str, Any]:
    """ComfyUI names nodes by numbers."""
    inputs = {
        key: [numbers[value[0]], value[1]] if isinstance(value, list) else value
        for key, value in node["inputs"].items()
    }
    return {**node, "inputs": inputs}
