"""Tiny flow models with random weights, built by the host's own classes."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.lumina.model
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
import comfy.model_patcher
import comfy.supported_models
import torch
from torch import Tensor

WIDTH = 32  # of the prompts
SIZES: dict[str, dict[str, Any]] = {
    "SD3": {
        "in_channels": 16,
        "patch_size": 2,
        "depth": 1,
        "input_size": None,
        "adm_in_channels": 64,
        "pos_embed_max_size": 32,
        "pos_embed_scaling_factor": None,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 64}},
    },
    "Flux": {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 64,
        "context_in_dim": WIDTH,
        "hidden_size": 64,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [8, 12, 12],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
    },
    "Z-Image": {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "dim": 256,  # as wide as its modulation is at least
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 8,
        "n_kv_heads": 8,
        "multiple_of": 32,
        "qk_norm": True,
        "cap_feat_dim": WIDTH,
        "axes_dims": [8, 12, 12],
        "axes_lens": [64, 64, 64],
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 8,
    },
    "Qwen-Image": {
        "image_model": "qwen_image",
        "in_channels": 64,
        "num_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (8, 12, 12),
    },
    "Wan": {
        "image_model": "wan2.1",
        "model_type": "t2v",
        "dim": 64,
        "ffn_dim": 128,
        "freq_dim": 64,
        "text_dim": WIDTH,
        "num_heads": 2,
        "num_layers": 1,
    },
}
NETWORKS = {
    "Flux": comfy.ldm.flux.model.FluxParams,
    "Z-Image": comfy.ldm.lumina.model.NextDiT,
    "Qwen-Image": comfy.ldm.qwen_image.model.QwenImageTransformer2DModel,
    "Wan": comfy.ldm.wan.model.WanModel,
}
CONFIGS = {
    "SD3": comfy.supported_models.SD3,
    "Flux": comfy.supported_models.Flux,
    "Z-Image": getattr(comfy.supported_models, "ZImage", comfy.supported_models.Lumina2),
    "Qwen-Image": comfy.supported_models.QwenImage,
    "Wan": comfy.supported_models.WAN21_T2V,
}
VIDEO = {"Qwen-Image": 1, "Wan": 2}
"""Frames of those that take latents (B, C, T, h, w)."""


def tiny(family: str, seed: int = 0) -> Any:
    """A MODEL of a family with random weights."""
    network = NETWORKS.get(family)
    known = inspect.signature(network).parameters if network else SIZES[family]
    sizes = {name: value for name, value in SIZES[family].items() if name in known or name == "image_model"}
    config = CONFIGS[family](sizes)
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, "")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in base.diffusion_model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = noise / max(weight[0].numel(), 1) ** 0.5 if weight.ndim > 1 else 0.02 * noise + ("norm" in name)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, cpu, cpu, size=1)


def prompt(family: str, seed: int, length: int = 8) -> Any:
    """A random prompt with all that a family reads."""
    generator = torch.Generator().manual_seed(seed)
    others: dict[str, Any] = {"pooled_output": torch.randn(1, 64, generator=generator), "guidance": 3.5}
    if family == "Z-Image":  # whose length older hosts take from here
        others["attention_mask"] = torch.ones(1, length, dtype=torch.int64)
    return [[torch.randn(1, length, WIDTH, generator=generator), others]]


def empty(family: str, side: int, batch: int = 1) -> Tensor:
    """An empty latent of a family."""
    frames = (VIDEO[family],) if family in VIDEO else ()
    return torch.zeros(batch, 16, *frames, side, side)
