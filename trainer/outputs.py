"""What a finished run leaves: files that every program loads, a model card, and a ComfyUI workflow that uses them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lcm_core.files.atomic import atomic_write, new_folder
from lcm_core.files.checkpoint import (
    Component,
    ModelInfo,
    list_components,
    read_component,
    save_diffusers,
    save_single_file,
)
from lcm_core.files.lora import save_lora
from lcm_core.files.recommended import SCHEDULERS, Recommended
from lcm_core.files.safetensors import write_json, write_safetensors
from lcm_core.networks.lora_layers import lora_state_dict, transformer_lora_state_dict
from lcm_core.pipeline.sources import CARD, MODELS, ModelSource
from trainer.config import DistillConfig
from trainer.methods.config import ConsistencyConfig, MethodConfig, TeacherJumpConfig
from trainer.methods.method import sampling_of
from trainer.options import to_dict
from trainer.report.tables import to_markdown
from trainer.students import Student, plain_config

DISTILL_KEY = "lcm_suite.distill"
"""Safetensors metadata: JSON of the settings that the weights were trained with."""
_CLIP_WORDS = 49408  # a tokenizer of another size is the model's own and must travel with it
_STORED = torch.float16


def run_name(config: DistillConfig) -> str:
    """Name of the files that come out."""
    return config.name or Path(config.output).resolve().name


def write_weights(config: DistillConfig, student: Student, source: ModelSource, info: ModelInfo) -> list[Path]:
    """Write the result: a LoRA in kohya's layout; or the whole model, as a diffusers folder and as one file.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    folder, name = Path(config.output), run_name(config)
    recommended = recommended_of(config, info)
    metadata = {**recommended.metadata(), DISTILL_KEY: json.dumps(to_dict(config)), "modelspec.title": name}
    if student.adapters is not None:
        file = folder / f"{name}_lora.safetensors"
        which: dict[str, Any] = {"ema": student.final == "ema", "dtype": _STORED}
        if source.family is None:
            save_lora(file, lora_state_dict(student.unet, **which), info.family, metadata)
        else:
            tensors = transformer_lora_state_dict(student.unet, source.family.lora_names, **which)
            write_safetensors(file, tensors, metadata)
        return [file]
    components = read_parts(source, config.vae) | {"unet": _unet_component(student)}
    _write_file(folder / f"{name}.safetensors", components, info, source, metadata)
    _write_folder(folder / "diffusers", components, info, source, recommended)
    return [folder / f"{name}.safetensors", folder / "diffusers"]


def recommended_of(config: DistillConfig, info: ModelInfo) -> Recommended:
    """How a student wants to be sampled; of a flow model with its shift."""
    said = sampling_of(config.method)
    return replace(said, shift=info.shift) if info.prediction_type == "flow" else said


def read_parts(source: ModelSource, vae: str = "") -> dict[str, Component]:
    """All networks of a model but its U-Net, as stored; the VAE is another one's where that is given."""
    parts = {"vae": read_component(vae or source.vae, "vae")}
    names = [name for name in list_components(source.text) if name.startswith("text_encoder")] or ["text_encoder"]
    return parts | {name: read_component(source.text, name) for name in names}


def _unet_component(student: Student) -> Component:
    network: Any = student.trained if student.average is None else student.average
    tensors = {name: tensor.detach().to(_STORED) for name, tensor in network.state_dict().items()}
    return Component(tensors, plain_config(network.config))


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


def write_card(config: DistillConfig, info: ModelInfo, rows: Sequence[Mapping[str, Any]], remark: str) -> Path:
    """README.md: what the model is, how it is used, what it was made with, how good it is."""
    file = Path(config.output) / "README.md"
    with atomic_write(file) as temporary:
        temporary.write_text(model_card(config, info, rows, remark), encoding="utf-8")
    return file


def model_card(config: DistillConfig, info: ModelInfo, rows: Sequence[Mapping[str, Any]], remark: str) -> str:
    """The model card, Markdown."""
    name, method, training = run_name(config), config.method, config.training
    is_lora = config.student.kind == "lora"
    what = f"LoRA of rank {config.student.rank}" if is_lora else "full model that reads guidance as an input"
    scale = "1 (the guidance is inside)" if is_lora else f"{1 + method.w_min:g} to {1 + method.w_max:g}"
    score = f"\n## Scores\n\n{to_markdown(rows)}\n{remark}\n" if rows else ""
    data = config.data.path or f"the prompts in {config.data.prompts}, painted by the teacher"
    return (
        f"# {name}\n\nPaints in 1 to 8 steps: a {what}, distilled from `{config.teacher}` ({info.family}, "
        f"{info.prediction_type}) by the method `{method.kind}` on {data}.\n\n## Use\n\n"
        f"Sampler {sampling_of(method)}, guidance scale {scale}.\n\n"
        f"{_usage(config, info, name, is_lora)}{score}\n"
        f"## Training\n\n{training.steps:,} steps of {training.batch_size}, learning rate {training.learning_rate:g}, "
        f"w {method.w_min:g} to {method.w_max:g}{_learnt_by(method)}. Everything is in "
        "`config.json`, which `python -m trainer distill --config` takes again.\n"
    )


def _learnt_by(method: MethodConfig) -> str:
    if isinstance(method, TeacherJumpConfig):
        return f", solver {method.solver}, loss {method.loss}"
    return f", loss {method.loss}" if isinstance(method, ConsistencyConfig) else ", without the paper's GAN loss"


def _flow_usage(config: DistillConfig, info: ModelInfo, name: str) -> str:
    """How a LoRA for a flow model is used. The jumps of trajectory methods are Euler's, which need no fresh noise."""
    said, file = recommended_of(config, info), f"{name}_lora.safetensors"
    scheduler = "FlowMatchLCMScheduler" if said.sampler == "lcm" else "FlowMatchEulerDiscreteScheduler"
    return (
        f'```\npython -m lcm_core generate "a lighthouse" --model {config.teacher} --lora {file}\n```\n\n'
        f"```python\nfrom diffusers import DiffusionPipeline, {scheduler}\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{config.teacher}")\n'
        f"pipe.scheduler = {scheduler}(shift={info.shift:g})\n"
        f'pipe.load_lora_weights("{file}")\n'
        f'pipe("a lighthouse", num_inference_steps={said.steps}, guidance_scale=1)\n```\n\n'
        f"ComfyUI: the file in `models/loras`, sampler `{'lcm' if said.sampler == 'lcm' else 'euler'}`, scheduler "
        f"`simple`, {said.steps} steps, CFG 1, and the model's sampling node with shift {info.shift:g}.\n"
    )


def _usage(config: DistillConfig, info: ModelInfo, name: str, is_lora: bool) -> str:
    if info.prediction_type == "flow":
        return _flow_usage(config, info, name)
    said = sampling_of(config.method)
    scheduler = SCHEDULERS[str(said.sampler)]
    how = f"num_inference_steps={said.steps}" + ("" if said.gamma is None else f", eta={said.gamma:g}")
    grid = "" if said.original_steps is None else f", original_inference_steps={said.original_steps}"
    if is_lora:
        file = f"{name}_lora.safetensors"
        pipeline, load = _teacher_pipeline(config.teacher, info)
        shipped = (MODELS / config.teacher / CARD).is_file()
        folder, network = (f"{config.teacher}-teacher", " --unet teacher") if shipped else (config.teacher, "")
        export = f"# python -m lcm_core export --model {config.teacher}{network} --to diffusers --path {folder}\n"
        python = (
            f"from diffusers import {pipeline}, {scheduler}\n\n{export if shipped else ''}"
            f'pipe = {pipeline}.{load}("{folder}")\n'
            f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{grid})\n"
            f'pipe.load_lora_weights("{file}")\n'
            f'pipe("a lighthouse", {how}, guidance_scale=1).images[0].save("picture.png")\n'
        )
        shell = f'python -m lcm_core generate "a lighthouse" --model {config.teacher}{network} --lora {file}'
        web = f"ComfyUI: `workflow_comfyui.json`, with the file in `models/loras`. A1111: `<lora:{file[:-12]}:1>`."
    else:
        python = (
            "from diffusers import DiffusionPipeline\n\n"
            'pipe = DiffusionPipeline.from_pretrained("diffusers")\n'
            f'pipe("a lighthouse", {how}, guidance_scale={1 + config.method.w_min:g})'
            '.images[0].save("picture.png")\n'
        )
        shell = f'python -m lcm_core generate "a lighthouse" --model {name}.safetensors'
        web = "ComfyUI and A1111 know no guidance input: `python -m lcm_core export` puts one value into the weights."
    return f"```\n{shell}\n```\n\n```python\n{python}```\n\n{web}\n"


def _teacher_pipeline(teacher: str, info: ModelInfo) -> tuple[str, str]:
    """diffusers' class for a teacher, and what loads it: only classes of one family read single files."""
    if Path(teacher).suffix != ".safetensors":
        return "DiffusionPipeline", "from_pretrained"
    return "StableDiffusionXLPipeline" if info.family == "sdxl" else "StableDiffusionPipeline", "from_single_file"


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _renumbered(node: Mapping[str, Any], numbers: Mapping[str, str]) -> dict[str, Any]:
    """ComfyUI names nodes by numbers."""
    inputs = {
        key: [numbers[value[0]], value[1]] if isinstance(value, list) else value
        for key, value in node["inputs"].items()
    }
    return {**node, "inputs": inputs}
