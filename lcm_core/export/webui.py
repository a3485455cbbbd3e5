"""Models for AUTOMATIC1111's web UI and for Forge: a checkpoint, what the host cannot read from it, and LoRAs.

A1111 takes the sizes of a network from a .yaml file beside the checkpoint, and assumes those of SD 1.5 where there is
none. Forge looks the sizes up in a table of known models; the LCM Suite extension adds those of a folder
`NAME.config` beside the checkpoint to it. Neither host can load an SD 2.x or SDXL network of other than the usual size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError
from lcm_core.files.atomic import atomic_write
from lcm_core.files.checkpoint import (
    CONFIG_KEY,
    Component,
    ModelInfo,
    read_safetensors,
    save_single_file,
    scheduler_config,
    write_safetensors,
)
from lcm_core.files.safetensors import read_metadata, write_json

CHECKPOINTS = Path("models", "Stable-diffusion")
LORAS = Path("models", "Lora")
CONFIGS = ".config"
"""End of the name of a folder with the configurations of a checkpoint's networks, beside the checkpoint."""
_USUAL_WIDTHS = {"sd1": [320, 640, 1280, 1280], "sd2": [320, 640, 1280, 1280], "sdxl": [320, 640, 1280]}
_USUAL_CONTEXT = {"sd1": 768, "sd2": 1024, "sdxl": 2048}
_USUAL_TEXT = "openai/clip-vit-large-patch14"  # A1111's own name for the text encoder of SD 1.x
_BETA_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}  # in ldm's words
_CLASSES = {
    "scheduler": "DDIMScheduler",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
_UNET_DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
}
_VAE_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [64],
    "layers_per_block": 1,
}
_PARAMETERIZATIONS = {"epsilon": "eps", "v_prediction": "v"}

_MODEL_YAML = """\
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "{parameterization}"
    beta_schedule: {beta_schedule}
    linear_start: {linear_start}
    linear_end: {linear_end}
    timesteps: {timesteps}
    first_stage_key: jpg
    cond_stage_key: txt
    cond_stage_trainable: false
    conditioning_key: crossattn
    image_size: {image_size}
    channels: {channels}
    scale_factor: {scale_factor}
    use_ema: false
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {unet}
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: {channels}
        ddconfig: {vae}
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.{text_class}
      params: {text}
"""


def check_webui(folder: Path, forge: bool) -> None:
    """Refuse, before any work, a folder that is not the host that was named.

    Raises:
        InputError: no web UI there, or the other one of the two.
    """
    if not (folder / "modules" / "sd_models.py").is_file():
        raise InputError(f"{folder} is no web UI (it has no modules/sd_models.py); give the folder that holds webui.py")
    is_forge = (folder / "modules_forge").is_dir()
    if is_forge != forge:
        name, other = ("Forge", "forge") if is_forge else ("AUTOMATIC1111's web UI", "a1111")
        raise InputError(f"{folder} is {name}; use --to {other}")


def export_checkpoint(
    folder: Path,
    name: str,
    components: Mapping[str, Component],
    info: ModelInfo,
    tokenizer_files: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Put a model into a web UI's list of checkpoints. An earlier export of the same name is replaced.

    Args:
        folder: the host's.
        name: what the list shows, without a suffix.
        components: all networks of the model.
        info: its family, prediction type and noise schedule.
        tokenizer_files: name to text, for a model with a vocabulary of its own.
        metadata: more safetensors metadata for the checkpoint.

    Returns:
        The files and folders that were written, the checkpoint first.

    Raises:
        InputError: a network that the host cannot build, or a file of another origin in the way.
    """
    checkpoint = folder / CHECKPOINTS / f"{name}.safetensors"
    _check_replaceable(checkpoint)
    own = _has_own_size(components, info) or bool(tokenizer_files)
    _check_supported(name, components, info, own)
    configs = checkpoint.with_suffix(CONFIGS)
    written = _write_yaml(checkpoint, components, info, configs.absolute() / "tokenizer" if tokenizer_files else None)
    if own:
        written.append(_write_configs(configs, components, info, tokenizer_files or {}))
    save_single_file(checkpoint, components, info, tokenizer_files, metadata)  # last: what is listed is complete
    return [checkpoint, *written]


def export_lora(folder: Path, file: Path, name: str) -> list[Path]:
    """Put a LoRA, in kohya's layout, into a web UI's list.

    Raises:
        InputError: a file of that name and another origin is there.
    """
    target = folder / LORAS / f"{name}.safetensors"
    tensors, metadata = read_safetensors(file)
    if target.exists() and read_safetensors(target)[0].keys() != tensors.keys():
        raise InputError(f"{target} exists and is another LoRA; move or rename it first")
    write_safetensors(target, tensors, metadata)
    return [target]


def webui_yaml(components: Mapping[str, Component], info: ModelInfo, text_folder: Path | None = None) -> str:
    """A1111's description of an SD 1.x or SD 2.x model, as YAML.

    Args:
        components: the networks; only their configurations are read.
        info: prediction type and noise schedule.
        text_folder: where tokenizer and text encoder's configuration lie; None for those of SD 1.x or SD 2.x.

    Raises:
        InputError: something that this description has no words for.
    """
    unet, vae = _with_defaults(components["unet"].config), _with_defaults(components["vae"].config)
    if info.trained_betas is not None:
        raise InputError("the web UI cannot be told the model's trained_betas; export it --to single-file or diffusers")
    if info.prediction_type not in _PARAMETERIZATIONS or info.beta_schedule not in _BETA_SCHEDULES:
        raise InputError(
            f"the web UI knows no model with prediction type {info.prediction_type} on schedule {info.beta_schedule}; "
            "export one that predicts epsilon or v on a scaled_linear, linear or cosine schedule"
        )
    openclip = info.family == "sd2"
    text = {"freeze": True, "layer": "penultimate"} if openclip else {"version": str(text_folder or _USUAL_TEXT)}
    return _MODEL_YAML.format(
        parameterization=_PARAMETERIZATIONS[info.prediction_type],
        beta_schedule=_BETA_SCHEDULES[info.beta_schedule],
        linear_start=info.beta_start,
        linear_end=info.beta_end,
        timesteps=info.num_train_timesteps,
        image_size=unet.get("sample_size", 64),
        channels=vae["latent_channels"],
        scale_factor=vae.get("scaling_factor", 0.18215),
        unet=json.dumps(_ldm_unet(unet)),  # JSON is YAML
        vae=json.dumps(_ldm_vae(vae)),
        text_class="FrozenOpenCLIPEmbedder" if openclip else "FrozenCLIPEmbedder",
        text=json.dumps(text),
    )


def _write_yaml(
    checkpoint: Path, components: Mapping[str, Component], info: ModelInfo, text_folder: Path | None
) -> list[Path]:
    """The .yaml of a checkpoint. SDXL needs none: the hosts know it."""
    if info.family == "sdxl":
        return []
    file = checkpoint.with_suffix(".yaml")
    with atomic_write(file) as temporary:
        temporary.write_text(webui_yaml(components, info, text_folder), encoding="utf-8")
    return [file]


def _write_configs(
    folder: Path, components: Mapping[str, Component], info: ModelInfo, tokenizer_files: Mapping[str, str]
) -> Path:
    """A diffusers folder without weights, as Forge reads it. A1111 reads `tokenizer` in it."""
    index = {name: ["transformers" if name[0] == "t" else "diffusers", kind] for name, kind in _CLASSES.items()}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(info))
    for name in ("unet", "vae", "text_encoder"):
        write_json(folder / name / "config.json", components[name].config)
    # A1111 looks for the tokenizer and for the text encoder's configuration in one folder
    write_json(folder / "tokenizer" / "config.json", components["text_encoder"].config)
    for name, text in tokenizer_files.items():
        with atomic_write(folder / "tokenizer" / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline", **index})
    return folder


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with what diffusers takes where it says nothing."""
    is_vae = "latent_channels" in config or config.get("_class_name") == "AutoencoderKL"
    return (_VAE_DEFAULTS if is_vae else _UNET_DEFAULTS) | dict(config)


def _ldm_unet(config: Mapping[str, Any]) -> dict[str, Any]:
    """ldm's arguments for a U-Net that diffusers describes so."""
    channels, heads = config["block_out_channels"], config["attention_head_dim"]
    heads = (
        heads if isinstance(heads, list) else [heads] * len(channels)
    )  # diffusers' name is a mistake: it counts them
    depths = config.get("transformer_layers_per_block", 1)
    depth = depths[0] if isinstance(depths, list) else depths
    widths = {channel // count for channel, count in zip(channels, heads, strict=True)}
    if len(set(heads)) > 1 and len(widths) > 1:
        raise InputError(f"the web UI cannot build a U-Net with {heads} attention heads for {channels} channels")
    return {
        "image_size": 32,  # ldm asks for it and does not use it
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [channel // channels[0] for channel in channels],
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": [2**i for i, kind in enumerate(config["down_block_types"]) if "CrossAttn" in kind],
        **({"num_heads": heads[0]} if len(set(heads)) == 1 else {"num_head_channels": widths.pop()}),
        "transformer_depth": depth,
        "context_dim": config["cross_attention_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(config.get("use_linear_projection", False)),
        "use_checkpoint": False,
        "legacy": False,
    }


def _ldm_vae(config: Mapping[str, Any]) -> dict[str, Any]:
    """ldm's arguments for an AutoencoderKL that diffusers describes so."""
    channels = config["block_out_channels"]
    return {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config.get("sample_size", 256),
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": channels[0],
        "ch_mult": [channel // channels[0] for channel in channels],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }


def _has_own_size(components: Mapping[str, Component], info: ModelInfo) -> bool:
    unet = _with_defaults(components["unet"].config)
    usual = (_USUAL_WIDTHS[info.family], _USUAL_CONTEXT[info.family])
    return (list(unet["block_out_channels"]), unet["cross_attention_dim"]) != usual


def _check_supported(name: str, components: Mapping[str, Component], info: ModelInfo, own: bool) -> None:
    if own and info.family != "sd1":
        raise InputError(
            f"{name} is an {info.family} model of its own size or vocabulary, which the web UIs cannot build; "
            "export it --to single-file or --to diffusers"
        )
    if components["vae"].config.get("_class_name") != "AutoencoderKL":
        raise InputError(f"{name} has a VAE that is no AutoencoderKL; export it with its full VAE")


def _check_replaceable(file: Path) -> None:
    if file.exists() and CONFIG_KEY not in read_metadata(file):
        raise InputError(f"{file} exists and is no export of LCM Suite; move or rename it first")
