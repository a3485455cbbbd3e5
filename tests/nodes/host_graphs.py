"""The graphs that host_patches.py compares: what each changes in the plain one, by the host's own nodes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

import nodes

SIDE, SEED, SCALE = 16, 3, 2.0
Changes = dict[str, dict[str, Any]]
CACHE = {"reuse_threshold": 5.0, "start_percent": 0.0, "end_percent": 0.9, "verbose": False}
PATCHES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "HyperTile": (
        "nodes_hypertile",
        "HyperTile",
        {"tile_size": 32, "swap_size": 3, "max_depth": 0, "scale_depth": False},
    ),
    "PAG": ("nodes_pag", "PerturbedAttentionGuidance", {"scale": 3.0}),
    "SAG": ("nodes_sag", "SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
    "FreeU": ("nodes_freelunch", "FreeU", {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.2}),
    "FreeU V2": ("nodes_freelunch", "FreeU_V2", {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}),
    "FreSca": ("nodes_fresca", "FreSca", {"scale_low": 1.0, "scale_high": 1.25, "freq_cutoff": 4}),
    "ToMe": ("nodes_tomesd", "TomePatchModel", {"ratio": 0.3}),
    "RescaleCFG": ("nodes_model_advanced", "RescaleCFG", {"multiplier": 0.7}),
    "RenormCFG": ("nodes_lumina2", "RenormCFG", {"cfg_trunc": 100.0, "renorm_cfg": 1.0}),
    "CFG-Zero*": ("nodes_cfg", "CFGZeroStar", {}),
    "CFGNorm": ("nodes_cfg", "CFGNorm", {"strength": 0.8}),
    "APG": ("nodes_apg", "APG", {"eta": 0.5, "norm_threshold": 5.0, "momentum": -0.5}),
    "TCFG": ("nodes_tcfg", "TCFG", {}),
    "Mahiro": ("nodes_mahiro", "Mahiro", {}),
    "NAG": ("nodes_nag", "NAGuidance", {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}),
    "CFG override": ("nodes_custom_sampler", "CFGOverride", {"cfg": 1.0, "start_percent": 0.0, "end_percent": 0.5}),
    "epsilon scaling": ("nodes_eps", "EpsilonScaling", {"scaling_factor": 1.05}),
    "TSR": ("nodes_eps", "TemporalScoreRescaling", {"tsr_k": 0.95, "tsr_sigma": 1.0}),
    "easy cache": ("nodes_easycache", "EasyCacheNode", CACHE),
    "self-attention": (
        "nodes_attention_multiply",
        "UNetSelfAttentionMultiply",
        {"q": 1.2, "k": 1.0, "v": 0.9, "out": 1.1},
    ),
    "cross-attention": (
        "nodes_attention_multiply",
        "UNetCrossAttentionMultiply",
        {"q": 1.0, "k": 1.2, "v": 1.1, "out": 1.0},
    ),
    "deep shrink": (
        "nodes_model_downscale",
        "PatchModelAddDownscale",
        {
            "block_number": 3,
            "downscale_factor": 2.0,
            "start_percent": 0.0,
            "end_percent": 0.35,
            "downscale_after_skip": True,
            "downscale_method": "bicubic",
            "upscale_method": "bicubic",
        },
    ),
}
"""Nodes from a MODEL to a MODEL."""


def outputs(result: Any) -> Any:
    """Of a node of either generation."""
    return getattr(result, "args", result)


def run(file: str, node: str, **inputs: Any) -> Any:
    """The first output of a node of the host; None where this host lacks it."""
    try:
        found: Any = getattr(importlib.import_module(f"comfy_extras.{file}"), node)
    except (ImportError, AttributeError):
        return None
    made = found.execute(**inputs) if hasattr(found, "GET_SCHEMA") else getattr(found(), found.FUNCTION)(**inputs)
    return outputs(made)[0]


def patched_models(suite: Any, model: Any) -> Changes:
    """By one node each, by LoRAs, by merging, and by functions such as IP-Adapter's."""
    found = {name: run(file, node, model=model, **inputs) for name, (file, node, inputs) in PATCHES.items()}
    file = suite.run("LCMLoraConvert", model=model, lora_name="peft.safetensors", save_as="for the stock loader")[2]
    load = nodes.LoraLoaderModelOnly().load_lora_model_only
    lora = load(model, file, 1.0)[0]
    width = model.model.model_config.unet_config["context_dim"]
    merging = {"model1": model, "model2": lora}
    found |= {
        "LoRA": lora,
        "two LoRAs": load(load(model, file, 0.3)[0], file, -0.8)[0],
        "merge": run("nodes_model_merging", "ModelMergeSimple", **merging, ratio=0.4),
        "merge by blocks": run("nodes_model_merging", "ModelMergeBlocks", **merging, input=1.0, middle=0.3, out=0.6),
        "subtract": run("nodes_model_merging", "ModelSubtract", **merging, multiplier=0.5),
        "hypernetwork": run(
            "nodes_hypernetwork", "HypernetworkLoader", model=model, hypernetwork_name=hypernetwork(width), strength=0.7
        ),
        "PerpNeg": run(
            "nodes_perpneg", "PerpNeg", model=model, empty_conditioning=suite.prompts["other"], neg_scale=0.5
        ),
        "sharpened": sharpened(model),
        "IP-Adapter": with_attention(model),
        "block patches": with_blocks(model),
    }
    return {name: {"model": changed} for name, changed in found.items() if changed is not None}


def hypernetwork(width: int) -> str:
    """A small one for layers of a width, in a file that the host lists."""
    generator = torch.Generator().manual_seed(4)
    layer = {"linear.weight": 0.05 * torch.randn(width, width, generator=generator), "linear.bias": torch.zeros(width)}
    file = Path(folder_paths.get_folder_paths("hypernetworks")[0], "small.pt")
    file.parent.mkdir(exist_ok=True)
    torch.save({width: [layer, layer]}, file)
    return file.name


def sharpened(model: Any) -> Any:
    """With an operation on the guidance's difference."""
    importlib.import_module("comfy_extras.nodes_post_processing")  # first: the two import each other
    sharpen = {"sharpen_radius": 3, "sigma": 1.0, "alpha": 0.5}
    operation = run("nodes_latent", "LatentOperationSharpen", **sharpen)
    return run("nodes_latent", "LatentApplyOperationCFG", model=model, operation=operation)


def with_attention(model: Any) -> Any:
    """With what IP-Adapter does: attention to tokens of its own is added behind each cross-attention."""
    clone = model.clone()
    clone.set_model_attn2_output_patch(lambda x, options: x + 0.3 * x.roll(1, dims=1))
    clone.set_model_attn1_patch(lambda q, k, v, options: (q, 1.1 * k, 0.9 * v))
    return clone


def with_blocks(model: Any) -> Any:
    """With functions on the features of blocks and on the whole call, which must be given the host's own timesteps."""
    clone = model.clone()
    clone.set_model_input_block_patch(lambda h, options: h * (1.05 if options["block"][1] == 2 else 1.0))
    clone.set_model_output_block_patch(lambda h, skip, options: (h, 0.95 * skip))
    clone.set_model_unet_function_wrapper(
        lambda apply, given: (
            apply(given["input"], given["timestep"], **given["c"]) * (1 + 0.01 * given["timestep"].mean() / 1000)
        )
    )
    return clone


def conditionings(suite: Any) -> Changes:
    """Prompts in areas, masks, spans of time and mixtures; ControlNets; LoRAs of a prompt alone."""
    positive, other, negative = (suite.prompts[name] for name in ("positive", "other", "negative"))
    left, ramp = masks()
    combine, control = nodes.ConditioningCombine().combine, nodes.ControlNetApplyAdvanced().apply_controlnet
    area = nodes.ConditioningSetArea().append(other, 4 * SIDE, 8 * SIDE, 4 * SIDE, 0, 1.0)[0]
    share = nodes.ConditioningSetAreaPercentage().append(other, 0.5, 0.75, 0.25, 0.25, 0.8)[0]
    weak = nodes.ConditioningSetAreaStrength().append(area, 0.4)[0]
    masked = nodes.ConditioningSetMask().append
    span = nodes.ConditioningSetTimestepRange().set_range
    zero = nodes.ConditioningZeroOut().zero_out(positive)[0]
    network = suite.run("LCMAdapterLoader", control_net_name="emoji_canny.safetensors")[0]
    picture = ramp[..., None].expand(-1, -1, -1, 3)
    outlines = control(positive, negative, network, picture, 1.0, 0.0, 1.0)
    late = control(positive, negative, network, picture, 0.7, 0.3, 0.8)
    twice = control(*outlines, network, picture.flip(2), 0.5, 0.0, 1.0)
    found = {
        "combined": {"positive": combine(positive, other)[0]},
        "concatenated": {"positive": nodes.ConditioningConcat().concat(positive, other)[0]},
        "average": {"positive": nodes.ConditioningAverage().addWeighted(positive, other, 0.3)[0]},
        "area": {"positive": combine(positive, area)[0]},
        "area in per cent": {"positive": combine(positive, share)[0]},
        "weak area": {"positive": combine(positive, weak)[0]},
        "mask of a prompt": {"positive": combine(positive, masked(other, left, "default", 1.0)[0])[0]},
        "bounds of a mask": {"positive": combine(positive, masked(other, left, "mask bounds", 0.7)[0])[0]},
        "in turns": {"positive": combine(span(positive, 0.0, 0.4)[0], span(other, 0.4, 1.0)[0])[0]},
        "zeroed negative": {"negative": zero},
        "ControlNet": {"positive": outlines[0], "negative": outlines[1]},
        "ControlNet in between": {"positive": late[0], "negative": late[1]},
        "two ControlNets": {"positive": twice[0], "negative": twice[1]},
        "ControlNet and area": {"positive": combine(outlines[0], area)[0], "negative": outlines[1]},
    }
    hooks = run(
        "nodes_hooks",
        "CreateHookLora",
        lora_name="for the stock loader.safetensors",
        strength_model=1.0,
        strength_clip=0.0,
    )
    own = run(
        "nodes_hooks",
        "ConditioningSetProperties",
        cond_NEW=positive,
        strength=1.0,
        set_cond_area="default",
        hooks=hooks,
    )
    return found | {"LoRA of a prompt": {"positive": own}}


def text_encoders(suite: Any, clip: Any) -> Changes:
    """What is changed in the text encoder."""
    text = "a slice of pizza, noto style"
    earlier = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    louder = {"q": 1.3, "k": 1.0, "v": 0.8, "out": 1.0}
    multiplied = run("nodes_attention_multiply", "CLIPAttentionMultiply", clip=clip, **louder)
    weighted = nodes.CLIPTextEncode().encode(clip, "(a slice:1.4) of [pizza], noto style")[0]
    return {
        "last layer": {"positive": nodes.CLIPTextEncode().encode(earlier, text)[0]},
        "text attention": {"positive": nodes.CLIPTextEncode().encode(multiplied, text)[0]},
        "weights of words": {"positive": weighted},
    }


def latents(suite: Any, model: Any, vae: Any) -> Changes:
    """Pictures, masks and batches; a mask that is soft, and one that grows from step to step."""
    left, ramp = masks()
    picture = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(9)) * 4
    image = {"samples": picture}
    pixels = ramp[..., None].expand(-1, -1, -1, 3)
    soft, hard = ({**image, "noise_mask": mask} for mask in (ramp, left))
    batch = nodes.RepeatLatentBatch().repeat({**image, "noise_mask": ramp}, 2)[0]
    alone = nodes.LatentFromBatch().frombatch(batch, 1, 1)[0]
    composite = nodes.LatentComposite().composite({"samples": torch.zeros_like(picture)}, image, 32, 32, 16)[0]
    inpaint = nodes.InpaintModelConditioning().encode(
        suite.prompts["positive"], suite.prompts["negative"], pixels, vae, left, True
    )
    differential = run("nodes_differential_diffusion", "DifferentialDiffusion", model=model)
    half = differential_by_half(model)
    found: Changes = {
        "hard mask": {"latent": nodes.SetLatentNoiseMask().set_mask(image, left)[0]},
        "soft mask": {"latent": soft},
        "two masks": {"latent": {"samples": picture.repeat(2, 1, 1, 1), "noise_mask": torch.cat([left, ramp])}},
        "from a batch": {"latent": alone},
        "batch": {"latent": batch},
        "encoded hole": {"latent": nodes.VAEEncodeForInpaint().encode(vae, pixels, left, 6)[0]},
        "inpaint conditioning": dict(zip(("positive", "negative", "latent"), inpaint, strict=True)),
        "composite": {"latent": {**composite, "noise_mask": left}},
        "differential": {"model": differential, "latent": soft},
        "differential, hard": {"model": differential, "latent": hard},
    }
    if half is not None:
        found["half differential"] = {"model": half, "latent": soft}
    return found


def differential_by_half(model: Any) -> Any:
    """With the strength that newer hosts have."""
    try:
        return run("nodes_differential_diffusion", "DifferentialDiffusion", model=model, strength=0.5)
    except TypeError:
        return None


def masks() -> tuple[Tensor, Tensor]:
    """Of the right half, and rising from left to right; (1, H, W)."""
    half = torch.zeros(1, 8 * SIDE, 8 * SIDE)
    half[..., : 4 * SIDE] = 1
    return half, torch.linspace(0, 1, 8 * SIDE).expand(1, 8 * SIDE, -1)
