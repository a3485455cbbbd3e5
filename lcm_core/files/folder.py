"""Diffusers folders: writing networks, the scheduler's configuration and the index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_core.diffusion.flow_map import END_KEY
from lcm_core.files import safetensors as weights
from lcm_core.files.components import Component, ModelInfo
from lcm_core.files.recommended import FOLDER_KEY, SCHEDULERS, Recommended
from lcm_core.files.safetensors import PathLike, write_json, write_safetensors

_NOTHING_SAID = Recommended()
_FLOW_MAP = "LCMSuiteFlowMapPipeline"  # no class of diffusers, so that it refuses what it could not sample

_USUAL_GRID = 50  # timesteps of a distillation, where nothing else is said; diffusers assumes them too


def save_component(folder: PathLike, component: Component, metadata: Mapping[str, str] | None = None) -> None:
    """Write one network as a diffusers (or transformers) folder; its configuration comes last, when all is whole."""
    target = Path(folder)
    is_text = "hidden_act" in component.config
    name = weights.TRANSFORMERS_WEIGHTS if is_text else weights.DIFFUSERS_WEIGHTS
    write_safetensors(target / name, component.tensors, metadata)
    write_json(target / "config.json", component.config)


def save_diffusers(
    folder: PathLike,
    components: Mapping[str, Component],
    info: ModelInfo,
    recommended: Recommended = _NOTHING_SAID,
) -> None:
    """Write networks as a diffusers folder with scheduler and `model_index.json`; the caller copies tokenizers.

    How the model wants to be sampled goes into the scheduler's configuration: diffusers' pipelines and our own then do
    it by themselves.
    """
    target = Path(folder)
    for name, component in components.items():
        save_component(target / name, component)
    scheduler = scheduler_config(info, recommended)
    write_json(target / "scheduler" / "scheduler_config.json", scheduler)
    write_json(target / "model_index.json", _model_index(components, info, scheduler["_class_name"]))


def scheduler_config(info: ModelInfo, recommended: Recommended = _NOTHING_SAID) -> dict[str, Any]:
    """diffusers' scheduler configuration that states this schedule, and what is recommended."""
    few_step = {
        "_class_name": SCHEDULERS.get(str(recommended.sampler)),
        "original_inference_steps": recommended.original_steps or _USUAL_GRID,
        "timestep_scaling": 10.0,
    }
    return (
        _plain_scheduler(info)
        | (few_step if recommended.is_distilled else {})
        | ({FOLDER_KEY: recommended.said} if recommended.said else {})
    )


def _plain_scheduler(info: ModelInfo) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": info.num_train_timesteps,
        "beta_start": info.beta_start,
        "beta_end": info.beta_end,
        "beta_schedule": info.beta_schedule,
        "trained_betas": None if info.trained_betas is None else list(info.trained_betas),
        "prediction_type": info.prediction_type,
        "rescale_betas_zero_snr": info.zero_terminal_snr,
        "timestep_spacing": "trailing" if info.zero_terminal_snr else "leading",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def _model_index(components: Mapping[str, Component], info: ModelInfo, scheduler: str) -> dict[str, Any]:
    sdxl = info.family == "sdxl"
    tokenizers = ("tokenizer", "tokenizer_2") if sdxl else ("tokenizer",)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if sdxl else "StableDiffusionPipeline",
        "scheduler": ["diffusers", scheduler],
        **{name: ["transformers", "CLIPTokenizer"] for name in tokenizers},
    }
    for name, component in components.items():
        library, default = ("transformers", "CLIPTextModel") if name.startswith("text") else ("diffusers", "")
        kind = component.config.get("_class_name") or component.config.get("architectures", [default])[0]
        index[name] = [library, kind]
        if END_KEY in component.config:
            index["_class_name"] = _FLOW_MAP
    optional = ("feature_extractor", "image_encoder") if sdxl else ("feature_extractor", "safety_checker")
    return index | {name: [None, None] for name in optional}
