"""Stand-ins for the files that the templates want downloaded: their names, layouts and sizes, but random weights.

Large matrices that change nothing but the time are holes in the file: zeros that take no space on the disk.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comfyui import find_python
from downloads import MODELS
from torch import nn

from lcm_core.files.ldm_convert import diffusers_to_ldm
from lcm_core.networks.lora_layers import TARGET_MODULES

RANK, ALPHA = 64, 8.0  # of the LoRAs
_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
_NOISE = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))  # a prime: no two rows begin alike
_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_OPENCLIP = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_VAE = {
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}


@dataclass(frozen=True)
class Weight:
    """One tensor of a file.

    Attributes:
        shape: its sizes.
        dtype: as it is stored.
        fill: all of its values; None for random ones that keep the spread of what they are multiplied with.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float16
    fill: float | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, a few at a time."""
        if self.fill is None:
            values = _NOISE / math.prod(self.shape[1:]) ** 0.5
        else:
            values = torch.full((min(len(_NOISE), math.prod(self.shape)),), self.fill)
        chunk = values.to(self.dtype).view(torch.uint8).numpy().tobytes()
        for begin in range(0, self.size, len(chunk)):
            yield chunk[: self.size - begin]


Weights = dict[str, Weight]


def write(file: Path, weights: Mapping[str, Weight]) -> None:
    """Write a .safetensors file piece by piece; zeros are left out, which most file systems store as nothing."""
    header: dict[str, Any] = {}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + weight.size
        header[name] = {"dtype": _NAMES[weight.dtype], "shape": weight.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for weight in weights.values():
            if weight.fill == 0:
                opened.seek(weight.size, os.SEEK_CUR)
            else:
                opened.writelines(weight.chunks())
        opened.truncate()


def write_stand_ins(models: Path, files: list[str], checkout: Path) -> list[Path]:
    """Write those of `downloads.MODELS` that are named.

    Args:
        models: the host's models folder.
        files: their names.
        checkout: the host, which knows the layout of Qwen-Image's.

    Returns:
        What was written.
    """
    weights: dict[str, Weights] = {}
    if "lcm-lora-sdv1-5.safetensors" in files:
        weights["v1-5-pruned-emaonly-fp16.safetensors"], weights["lcm-lora-sdv1-5.safetensors"] = _stable("sd1")
    if "lcm-lora-sdxl.safetensors" in files:
        weights["sd_xl_base_1.0.safetensors"], weights["lcm-lora-sdxl.safetensors"] = _stable("sdxl")
    if "qwen_image_vae.safetensors" in files:
        weights |= _qwen_image(checkout)
    assert sorted(weights) == sorted(files)
    for name in files:
        write(models / MODELS[name][0] / name, weights[name])
    return [models / MODELS[name][0] / name for name in files]


def _stable(family: str) -> tuple[Weights, Weights]:
    """A checkpoint of Stable Diffusion in one file, and its LCM-LoRA."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(**_UNETS[family])
        networks = {"unet": unet, "vae": AutoencoderKL(**_VAE), "text_encoder": CLIPTextModel(CLIPTextConfig(**_CLIP))}
        if family == "sdxl":
            config = CLIPTextConfig(**_OPENCLIP, projection_dim=1280)
            networks["text_encoder_2"] = CLIPTextModelWithProjection(config)
    state = diffusers_to_ldm({name: network.state_dict() for name, network in networks.items()}, family)
    layers = {name: layer for name, layer in unet.named_modules() if name.endswith(TARGET_MODULES)}
    lora: Weights = {}
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        lora |= _pair(f"lora_unet_{name.replace('.', '_')}", tuple(layer.weight.shape))
    return {name: _weight(name, tuple(tensor.shape)) for name, tensor in state.items()}, lora


def _qwen_image(checkout: Path) -> dict[str, Weights]:
    """Its files: one of the 60 blocks, a text encoder of full size whose layers are zeros, and the whole VAE."""
    script = Path(__file__).with_name("host_shapes.py")
    told = subprocess.run([find_python(checkout), script, checkout], capture_output=True, check=True, timeout=600)
    shapes = {part: {name: tuple(shape) for name, shape in of.items()} for part, of in json.loads(told.stdout).items()}
    fp8, bf16 = torch.float8_e4m3fn, torch.bfloat16
    lora: Weights = {}
    for name, shape in shapes["transformer"].items():
        if len(shape) > 1 and any(part in name for part in (".attn.", "_mlp.")):
            lora |= _pair(name.removesuffix(".weight"), shape, torch.float32)
    return {
        "qwen_image_fp8_e4m3fn.safetensors": {n: _weight(n, s, fp8) for n, s in shapes["transformer"].items()},
        "qwen_2.5_vl_7b_fp8_scaled.safetensors": _scaled(shapes["text"]),
        "qwen_image_vae.safetensors": {n: _weight(n, s, bf16) for n, s in shapes["vae"].items()},
        "Qwen-Image-Lightning-4steps-V1.0.safetensors": lora,
    }


def _scaled(shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """A text encoder whose matrices are float8 with a scale each, as the host wrote them when its template was new."""
    weights: Weights = {"scaled_fp8": Weight((2,), torch.float8_e4m3fn, 0.0)}
    for name, shape in shapes.items():
        if len(shape) == 2 and "embed" not in name:
            weights[name] = Weight(shape, torch.float8_e4m3fn, 0.0)
            weights[name.replace(".weight", ".scale_weight")] = Weight((), torch.float32, 1.0)
        else:
            weights[name] = _weight(name, shape, torch.bfloat16)
    return weights | {"lm_head.weight": Weight(shapes["model.embed_tokens.weight"], torch.bfloat16, 0.0)}


def _weight(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Weight:
    """A random matrix; a norm that leaves things as they are; no bias."""
    if math.prod(shape[1:]) > 1:
        return Weight(shape, dtype)
    return Weight(shape, dtype, 0.0 if name.endswith("bias") else 1.0)


def _pair(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Weights:
    """The three tensors of a LoRA's layer, for a weight of this shape."""
    return {
        f"{name}.alpha": Weight((), dtype, ALPHA),
        f"{name}.lora_down.weight": Weight((RANK, *shape[1:]), dtype),
        f"{name}.lora_up.weight": Weight((shape[0], RANK, *(1 for _ in shape[2:])), dtype),
    }
