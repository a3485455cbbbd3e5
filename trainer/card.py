"""The model card of a run, README.md: what came out, how it is used, what it was made with, how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lcm_core.families.known import is_class_conditional
from lcm_core.files.atomic import atomic_write
from lcm_core.files.checkpoint import ModelInfo
from lcm_core.files.recommended import SCHEDULERS, Recommended
from lcm_core.pipeline.sources import CARD, MODELS
from trainer.config import DistillConfig
from trainer.methods.config import ConsistencyConfig, Dmd2Config, MethodConfig, TeacherJumpConfig
from trainer.methods.method import get_method
from trainer.outputs import run_name
from trainer.report.tables import to_markdown


def write_card(
    config: DistillConfig, info: ModelInfo, said: Recommended, rows: Sequence[Mapping[str, Any]], remark: str
) -> Path:
    """README.md: what the model is, how it is used, what it was made with, how good it is."""
    file = Path(config.output) / "README.md"
    with atomic_write(file) as temporary:
        temporary.write_text(model_card(config, info, said, rows, remark), encoding="utf-8")
    return file


def model_card(
    config: DistillConfig, info: ModelInfo, said: Recommended, rows: Sequence[Mapping[str, Any]], remark: str
) -> str:
    """The model card, Markdown; `said` is how the student wants to be sampled."""
    name, method, training = run_name(config), config.method, config.training
    is_lora = config.student.kind == "lora"
    what = f"LoRA of rank {config.student.rank}" if is_lora else "full model that reads guidance as an input"
    is_inside = is_lora and said.guidance_scale is None
    scale = "1 (the guidance is inside)" if is_inside else f"{1 + method.w_min:g} to {1 + method.w_max:g}"
    score = f"\n## Scores\n\n{to_markdown(rows)}\n{remark}\n" if rows else ""
    data = config.data.path or f"the prompts in {config.data.prompts}, painted by the teacher"
    return (
        f"# {name}\n\nPaints in 1 to 8 steps: a {what}, distilled from `{config.teacher}` ({info.family}, "
        f"{info.prediction_type}) by the method `{method.kind}` on {data}.\n\n## Use\n\n"
        f"Sampler {said}, guidance scale {scale}.\n\n"
        f"{_usage(config, info, said, name, is_lora)}{score}\n"
        f"## Training\n\n{training.steps:,} steps of {training.batch_size}, learning rate {training.learning_rate:g}, "
        f"w {method.w_min:g} to {method.w_max:g}{_learnt_by(method)}. Everything is in "
        "`config.json`, which `python -m trainer distill --config` takes again.\n"
    )


def _learnt_by(method: MethodConfig) -> str:
    if isinstance(method, TeacherJumpConfig):
        return f", solver {method.solver}, loss {method.loss}"
    if isinstance(method, Dmd2Config):
        return f", GAN weight {method.gan_weight:g}" if method.gan_weight else ", without the paper's GAN loss"
    return f", loss {method.loss}" if isinstance(method, ConsistencyConfig) else ""


def _flow_usage(config: DistillConfig, info: ModelInfo, said: Recommended, name: str) -> str:
    """How a LoRA for a flow model is used. The jumps of trajectory methods are Euler's, which need no fresh noise."""
    file, guidance = f"{name}_lora.safetensors", said.guidance_scale
    reads = "" if guidance is None else f" --guidance {guidance:g}"
    node = "" if guidance is None else f", FluxGuidance {guidance:g}"
    scheduler = "FlowMatchLCMScheduler" if said.sampler == "lcm" else "FlowMatchEulerDiscreteScheduler"
    return (
        f'```\npython -m lcm_core generate "a lighthouse" --model {config.teacher} --lora {file}{reads}\n```\n\n'
        f"```python\nfrom diffusers import DiffusionPipeline, {scheduler}\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{config.teacher}")\n'
        f"pipe.scheduler = {scheduler}(shift={info.shift:g})\n"
        f'pipe.load_lora_weights("{file}")\n'
        f'pipe("a lighthouse", num_inference_steps={said.steps}, guidance_scale={guidance or 1:g})\n```\n\n'
        f"ComfyUI: the file in `models/loras`, sampler `{'lcm' if said.sampler == 'lcm' else 'euler'}`, scheduler "
        f"`simple`, {said.steps} steps, CFG 1{node}, and the model's sampling node with shift {info.shift:g}.\n"
    )


def _usage(config: DistillConfig, info: ModelInfo, said: Recommended, name: str, is_lora: bool) -> str:
    if info.prediction_type == "flow":
        return _flow_usage(config, info, said, name)
    if is_class_conditional(info.family):
        return _class_usage(config, name, is_lora)
    if get_method(config.method).needs_end:
        return _flow_map_usage(said)
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
            f'pipe("a lighthouse", {how}, guidance_scale={said.guidance_scale:g})'
            '.images[0].save("picture.png")\n'
        )
        shell = f'python -m lcm_core generate "a lighthouse" --model {name}.safetensors'
        web = "ComfyUI and A1111 know no guidance input: `python -m lcm_core export` puts one value into the weights."
    return f"```\n{shell}\n```\n\n```python\n{python}```\n\n{web}\n{_beside(config, name)}"


def _beside(config: DistillConfig, name: str) -> str:
    """How a student of a teacher with LoRAs is used."""
    if not config.lora:
        return ""
    others = " ".join(f"--lora {lora}" for lora in config.lora)
    return (
        f"\nThe style is inside. `{name}_patch.safetensors` is the speed alone, to be used beside the style:\n\n"
        f'```\npython -m lcm_core generate "a lighthouse" --model {config.teacher} {others} '
        f"--lora {name}_patch.safetensors\n```\n"
    )


def _class_usage(config: DistillConfig, name: str, is_lora: bool) -> str:
    model, file = (config.teacher, f"{name}_lora.safetensors") if is_lora else ("diffusers", "")
    shell = f"python -m lcm_core generate --class NAME --model {model}" + (f" --lora {file}" if is_lora else "")
    lora = f', lora=[("{file}", 1.0)]' if is_lora else ""
    return (
        f"```\n{shell}\n```\n\n```python\nfrom lcm_core.pipeline import Pipeline\n\n"
        f'pipe = Pipeline.load("{model}"{lora})\nprint(pipe.model.classes)\n'
        'pipe(pipe.model.classes[0]).images[0].save("picture.png")\n```\n'
    )


def _flow_map_usage(said: Recommended) -> str:
    return (
        '```\npython -m lcm_core generate "a lighthouse" --model diffusers --steps 8\n```\n\n'
        '```python\nfrom lcm_core.pipeline import Pipeline\n\npipe = Pipeline.load("diffusers")\n'
        f'pipe("a lighthouse", num_inference_steps=8, guidance_scale={said.guidance_scale:g})'
        '.images[0].save("picture.png")\n```\n\n'
        "It can be sampled with any number of steps. The network is told where each step ends; diffusers, ComfyUI and "
        "A1111 cannot tell it, and do not open it.\n"
    )


def _teacher_pipeline(teacher: str, info: ModelInfo) -> tuple[str, str]:
    """diffusers' class for a teacher, and what loads it: only classes of one family read single files."""
    if Path(teacher).suffix != ".safetensors":
        return "DiffusionPipeline", "from_pretrained"
    return "StableDiffusionXLPipeline" if info.family == "sdxl" else "StableDiffusionPipeline", "from_single_file"
