"""Model files in and out: diffusers folders and single-file SD 1.x, SD 2.x and SDXL checkpoints. Safetensors only."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files import architecture, ldm_convert
from lcm_core.files import safetensors as weights
from lcm_core.files.architecture import Family
from lcm_core.files.reading import parse_json
from lcm_core.files.recommended import FOLDER_KEY, SCHEDULERS, Recommended
from lcm_core.files.safetensors import (
    PathLike,
    check_checksum,
    check_finite,
    read_safetensors,
    write_json,
    write_safetensors,
)

__all__ = [
    "COMPONENTS",
    "CONFIG_KEY",
    "TOKENIZER_KEY",
    "Component",
    "ModelInfo",
    "check_finite",
    "detect_architecture",
    "detect_prediction",
    "list_components",
    "read_component",
    "read_info",
    "read_safetensors",
    "save_component",
    "save_diffusers",
    "save_single_file",
    "scheduler_config",
    "write_safetensors",
]

CONFIG_KEY = "lcm_suite.config"
"""Safetensors metadata: JSON of each network's configuration, for what shapes cannot tell (heads, groups, scaling)."""
TOKENIZER_KEY = "lcm_suite.tokenizer"
"""Safetensors metadata: JSON of the tokenizer's files, name to text, for models with a vocabulary of their own."""
COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Spread of a norm's bias above which an SD 2.x U-Net was trained for v-prediction; ComfyUI's rule of thumb.
_V_PREDICTION_SPREAD = 0.09
_checked: set[tuple[str, int, int]] = set()
_MODELSPEC = {"epsilon": "epsilon", "v_prediction": "v"}
_NOTHING_SAID = Recommended()
_USUAL_GRID = 50  # timesteps of a distillation, where nothing else is said; diffusers assumes them too


@dataclass(frozen=True)
class ModelInfo:
    """What a model is and how its noise was scheduled."""

    family: Family
    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False
    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    trained_betas: tuple[float, ...] | None = None
    """The variances themselves, in place of the named schedule."""


@dataclass
class Component:
    """One network: its weights in diffusers' layout, its configuration, and where they came from."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    source: str = ""


def detect_architecture(state: Mapping[str, Tensor]) -> Family:
    """The family of a whole checkpoint or of a bare U-Net, in the ldm or diffusers layout.

    Raises:
        InputError: it is none of SD 1.x, SD 2.x, SDXL.
    """
    unet = _split(state).get("unet")
    if unet is None:
        raise InputError(
            f"unknown architecture: no U-Net found (first weight: '{next(iter(state), 'nothing')}'); "
            "give an SD 1.x, SD 2.x or SDXL model"
        )
    return architecture.unet_family(unet)


def detect_prediction(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[str, bool]:
    """What a single file says about its prediction type and zero terminal SNR.

    In this order: the marker key `v_pred`; the metadata `modelspec.prediction_type`; for SD 2.x the spread of
    one norm's bias, which is wider after v-prediction training. Else epsilon. Zero terminal SNR has the marker `ztsnr`.

    Returns:
        (prediction type, zero terminal SNR).
    """
    zero_snr = "ztsnr" in state
    stated = "v" if "v_pred" in state else metadata.get("modelspec.prediction_type", "")
    if stated:
        return ("v_prediction" if stated.startswith("v") else "epsilon"), zero_snr
    unet = _split(state).get("unet", {})
    last = unet.get("up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias")
    wide = last is not None and architecture.unet_family(unet) == "sd2" and last.float().std() > _V_PREDICTION_SPREAD
    return ("v_prediction" if wide else "epsilon"), zero_snr


def read_info(path: PathLike, prediction_type: str | None = None) -> ModelInfo:
    """Family, prediction type and noise schedule, from a folder's scheduler configuration or from a single file.

    Args:
        path: a diffusers folder, a U-Net's own folder, or a single file.
        prediction_type: overrides what the model says of itself.
    """
    root = Path(path)
    if root.is_dir():
        folder = _component_folder(root, "unet")
        family = _family_of_config(weights.read_json(folder / "config.json"))
        file = folder.parent / "scheduler" / "scheduler_config.json"
        stated = weights.read_json(file) if file.is_file() else {}
    else:
        state, metadata = read_safetensors(root)
        family = _named(root, detect_architecture, state)
        if unknown := ldm_convert.unknown_keys(state):
            warnings.warn(f"{root}: {len(unknown)} weights are not used (first: '{unknown[0]}')", stacklevel=2)
        file, stated = root, _stated(metadata, root, "scheduler")
        if not stated:
            prediction, zero_snr = detect_prediction(state, metadata)
            stated = {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    info = _info(family, stated, file)
    return replace(info, prediction_type=prediction_type) if prediction_type else info


def list_components(path: PathLike) -> list[str]:
    """Names of the networks that a diffusers folder or a single file holds."""
    root = Path(path)
    if root.is_dir():
        return [name for name in COMPONENTS if (root / name / "config.json").is_file()]
    held = _named(root, _split, read_safetensors(root)[0])
    return [name for name in COMPONENTS if name in held]


def read_component(path: PathLike, name: str) -> Component:
    """One network of a model.

    Args:
        path: a diffusers folder; one network's own folder; a single file with the whole model; or a file with this
            network alone, in either layout.
        name: "unet", "vae", "text_encoder" or "text_encoder_2".

    Raises:
        InputError: the model has no such network, or a file of it cannot be read, or its configuration says what no
            network can be.
    """
    root = Path(path)
    if root.is_dir():
        folder = _component_folder(root, name)
        config = weights.read_json(folder / "config.json")
        architecture.check_config(config, str(folder / "config.json"))
        return Component(_modern(name, weights.read_folder(folder)), config, str(folder))
    state, metadata = read_safetensors(root)
    _check_once(root, state, metadata)
    components = _named(root, _split, state)
    if name not in components:
        held = ", ".join(components) or f"no known network; first weight '{next(iter(state), 'nothing')}'"
        raise InputError(f"{root} has no {name} (it has: {held}); give a model that has one")
    config = _named(root, _infer_config, components, name, ldm_convert.is_openclip(state, name))
    config |= _stated(metadata, root, name)
    architecture.check_config(config, f"{root} ({name})")
    return Component(components[name], config, str(root))


def save_single_file(
    path: PathLike,
    components: Mapping[str, Component],
    info: ModelInfo,
    tokenizer_files: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write networks as one checkpoint in the ldm layout that the web UIs read.

    Args:
        path: the file to write.
        components: networks by name; what is left out is left out of the file.
        info: family and schedule; v-prediction and zero terminal SNR are marked as hosts expect (`v_pred`, `ztsnr`).
        tokenizer_files: name to text; only for a model with a vocabulary of its own.
        metadata: more safetensors metadata.
    """
    state = ldm_convert.diffusers_to_ldm({name: part.tensors for name, part in components.items()}, info.family)
    marks = {"v_pred": info.prediction_type == "v_prediction", "ztsnr": info.zero_terminal_snr}
    state |= {name: torch.tensor([]) for name, marked in marks.items() if marked}
    stated = {name: part.config for name, part in components.items()} | {"scheduler": scheduler_config(info)}
    extra = {CONFIG_KEY: json.dumps(stated)}
    if info.prediction_type in _MODELSPEC:
        extra["modelspec.prediction_type"] = _MODELSPEC[info.prediction_type]
    if tokenizer_files:
        extra[TOKENIZER_KEY] = json.dumps(dict(tokenizer_files))
    write_safetensors(path, state, {**extra, **(metadata or {})})


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


def _split(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The networks of a file in diffusers' layout, whether it is a whole checkpoint or one bare network."""
    if components := ldm_convert.ldm_to_diffusers(state):
        return components
    if "input_blocks.0.0.weight" in state:
        return {"unet": ldm_convert.unet_to_diffusers(state)}
    if "encoder.mid.block_1.conv1.weight" in state:
        return {"vae": ldm_convert.vae_to_diffusers(state)}
    bare = {
        "unet": "conv_in.weight",
        "vae": "encoder.mid_block.resnets.0.conv1.weight",
        "text_encoder": "text_model.embeddings.token_embedding.weight",
    }
    tiny = {"vae"} if "encoder.layers.0.weight" in state and "decoder.layers.0.weight" in state else set()
    found = {name for name, key in bare.items() if key in state} | tiny
    return {name: _modern(name, state) for name in found}


def _modern(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Today's names for weights that an older version of diffusers or transformers wrote."""
    if name == "unet":
        return dict(state)
    return ldm_convert.modern_vae(state) if name == "vae" else ldm_convert.clip_to_diffusers(state)


def _infer_config(components: Mapping[str, Mapping[str, Tensor]], name: str, openclip: bool) -> dict[str, Any]:
    family = architecture.unet_family(components["unet"]) if "unet" in components else None
    if name == "unet":
        return architecture.unet_config(components["unet"])
    if name == "vae":
        return architecture.vae_config(components["vae"], family)
    return architecture.text_config(components[name], openclip, projected=name == "text_encoder_2")


def _named(root: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`, putting the file's name before its complaint."""
    try:
        return function(*args)
    except InputError as error:
        raise InputError(f"{root}: {error}") from error


def _component_folder(root: Path, name: str) -> Path:
    if (root / name).is_dir():
        return root / name
    if (root / "config.json").is_file():
        return root
    held = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
    raise InputError(f"{root} has no {name} folder (it has: {held}); give a diffusers folder or a single file")


def _stated(metadata: Mapping[str, str], root: Path, name: str) -> dict[str, Any]:
    """The configuration that one of our own files states for a network, or for the scheduler."""
    where = f"the metadata '{CONFIG_KEY}' of {root}"
    stated = parse_json(metadata.get(CONFIG_KEY, "{}"), where, "export it again").get(name, {})
    if not isinstance(stated, dict):
        raise InputError(f"{where} holds no JSON object for {name}; export it again")
    return stated


def _check_once(file: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Check a file's checksum the first time that this process takes weights of it."""
    known = file.stat()
    key = (str(file.absolute()), known.st_size, known.st_mtime_ns)
    if key not in _checked:
        check_checksum(file, state, metadata)
        _checked.add(key)


def _family_of_config(unet: Mapping[str, Any]) -> Family:
    if unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def _info(family: Family, scheduler: Mapping[str, Any], source: Path) -> ModelInfo:
    names = {"zero_terminal_snr": "rescale_betas_zero_snr"}
    fields = (f for f in ModelInfo.__dataclass_fields__ if f != "family")
    stated = {f: scheduler[names.get(f, f)] for f in fields if scheduler.get(names.get(f, f)) is not None}
    architecture.check_scheduler(stated, source)
    if "trained_betas" in stated:
        stated["trained_betas"] = tuple(map(float, stated["trained_betas"]))
        stated["num_train_timesteps"] = len(stated["trained_betas"])
    return ModelInfo(family, **stated)


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
    optional = ("feature_extractor", "image_encoder") if sdxl else ("feature_extractor", "safety_checker")
    return index | {name: [None, None] for name in optional}
