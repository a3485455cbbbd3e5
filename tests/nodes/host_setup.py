"""What the tests with a real ComfyUI (host_run.py) lay out in a folder, and how they start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lcm_core.files.checkpoint import AS_FLOW, read_component, save_single_file
from lcm_core.files.recommended import Recommended
from lcm_core.files.safetensors import read_safetensors, write_safetensors
from lcm_core.networks.unet import load_unet
from lcm_core.pipeline.model import Model, load_model
from lcm_core.pipeline.sources import MODELS as SHIPPED
from lcm_core.pipeline.sources import find_source
from trainer.recipes.emoji.control import build_adapter

CHECKOUT = os.environ.get("COMFYUI_PATH")
NEEDS_HOST = [
    pytest.mark.host,
    pytest.mark.skipif(not CHECKOUT, reason="COMFYUI_PATH is not set to a ComfyUI checkout"),
]
SIZE = 8  # of latents
PROMPTS = {"positive": "a slice of pizza, noto style", "negative": "", "other": "a red apple, noto style"}
MODELS = {"full": "lcm", "cfg": "teacher"}


class AsLatents:
    """In place of a VAE: lcm_core then hands out latents, in the host's scale."""

    def __init__(self, vae: Any) -> None:
        self.latent_channels, self.scale, self.scaling_factor = vae.latent_channels, vae.scale, vae.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Only the scale."""
        return latents / self.scaling_factor


def layout(folder: Path, prediction: str) -> dict[str, Model]:
    """Both U-Nets of the embedded model as checkpoints, said to predict `prediction`, and as lcm_core's models."""
    checkpoints = folder / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    models = {}
    for name, unet in MODELS.items():
        source = find_source("emoji", unet)
        places = {"unet": source.unet, "vae": source.vae, "text_encoder": source.text}
        parts = {part: read_component(place, part) for part, place in places.items()}
        info = replace(source.info, prediction_type=prediction)
        save_single_file(checkpoints / f"{name}.safetensors", parts, info)
        if name == "cfg":
            save_single_file(checkpoints / "flow.safetensors", parts, info, marks=[AS_FLOW])
        models[name] = load_model("emoji", "cpu", torch.float32, unet=unet)
        models[name].diffusion = replace(models[name].diffusion, prediction_type=prediction)
        models[name].vae = AsLatents(models[name].vae)  # type: ignore[assignment]
    return models


def encode(model: Model, name: str) -> dict[str, Any]:
    """A prompt's conditioning."""
    return model.encode([PROMPTS[name]], 8 * SIZE, 8 * SIZE)


def find_host_python() -> str:
    """ComfyUI's: $COMFYUI_PYTHON, or the one of the virtual environment beside the checkout."""
    python = os.environ.get("COMFYUI_PYTHON") or f"{str(CHECKOUT).rstrip('/')}-venv/bin/python"
    return python if Path(python).exists() else sys.executable


def run_script(name: str, folder: Path, *arguments: str, **environment: str) -> str:
    """Run a script of this folder in the host's Python on a folder of data; returns what it prints."""
    command = [find_host_python(), str(Path(__file__).with_name(name)), str(CHECKOUT), str(folder), *arguments]
    usual = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # as a user would start the host
    done = subprocess.run(
        command, cwd=CHECKOUT, env=usual | environment, capture_output=True, text=True, check=False, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_host(folder: Path) -> Any:
    """Run all trials, or the cases, on a folder; returns the findings."""
    run_script("host_run.py", folder)
    return json.loads((folder / "findings.json").read_text())


def save_tensors(folder: Path, model: Model) -> torch.Tensor:
    """Prompts and latents for the host; returns the image's latents."""
    generator = torch.Generator().manual_seed(9)
    image = torch.randn(1, 4, SIZE, SIZE, generator=generator) * 4
    tensors = {name: encode(model, name)["encoder_hidden_states"].contiguous() for name in PROMPTS}
    tensors |= {"image": image, "empty": torch.zeros_like(image), "empty two": torch.zeros(2, 4, SIZE, SIZE)}
    tensors |= {"smallest": torch.zeros(1, 4, 1, 1), "narrow": torch.zeros(1, 4, 5, 1)}
    tensors |= {"sixteen channels": torch.ones(1, 16, SIZE, SIZE), "video": torch.zeros(1, 4, 3, SIZE, SIZE)}
    tensors["training"] = torch.randn(6, 4, SIZE, SIZE, generator=generator) * 4
    save_file(tensors, folder / "tensors.safetensors")
    return image


def peft_lora(width: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA in peft's layout for the middle block's self-attention."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        key = f"base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(width, rank, generator=generator)
    return tensors


def save_adapters(folder: Path) -> None:
    """T2I-Adapters of several widths, and files that are none, for the host; and in control.safetensors outlines, and
    what diffusers' T2IAdapter makes of them, which is "NAME features NUMBER"."""
    controls = folder / "models" / "controlnet"
    controls.mkdir()
    shipped = read_safetensors(SHIPPED / "emoji" / "control" / "emoji_canny.safetensors")[0]
    widths = {"emoji": (64, 128, 128, 128), "odd": (32, 32, 48, 64), "usual": (32, 64, 128, 128)}
    tensors = {"outlines": (torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(4)) > 0.9).float()}
    for name, channels in widths.items():
        torch.manual_seed(len(tensors))
        adapter = build_adapter(list(channels)).requires_grad_(False)
        if name == "emoji":
            adapter.load_state_dict({key: weight.float() for key, weight in shipped.items()})
        tensors |= {f"{name} features {i}": t.contiguous() for i, t in enumerate(adapter(tensors["outlines"]))}
        state = adapter.state_dict()
        save_file(host_layout(state) if name == "odd" else state, controls / f"{name}.safetensors")
        if name == "odd":
            del state["adapter.body.3.resnets.0.block1.bias"]
            save_file(state, controls / "cut.safetensors")
    save_file({"x": torch.zeros(1)}, controls / "other.safetensors")
    save_file(tensors, folder / "control.safetensors")


def host_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's weights as the first T2I-Adapters were saved, with blocks that are counted through."""
    names = {f"adapter.body.{i}.resnets.{j}.": f"body.{2 * i + j}." for i in range(4) for j in range(2)}
    names |= {f"adapter.body.{i}.in_conv.": f"body.{2 * i}.in_conv." for i in range(4)}
    names["adapter.conv_in."] = "conv_in."
    renamed = {}
    for key, weight in state.items():
        [start] = filter(key.startswith, names)
        renamed[names[start] + key.removeprefix(start)] = weight
    return renamed


def run_trials(folder: Path) -> Any:
    """What all trials of the script found, in one run of the host."""
    models = layout(folder, find_source("emoji").info.prediction_type)
    save_tensors(folder, models["full"])
    save_adapters(folder)
    loras = folder / "models" / "loras"
    loras.mkdir()
    unet = load_unet(find_source("emoji", "teacher").unet, "cpu", torch.float32)
    width = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.in_features
    save_file(peft_lora(width), loras / "peft.safetensors")
    save_file(peft_lora(1280), loras / "wide.safetensors")
    stated = Recommended("tcd", 2, 0.0, 10).metadata()
    save_file(peft_lora(width), loras / "phased.safetensors", stated)
    cfg = folder / "models" / "checkpoints" / "cfg.safetensors"
    tensors, metadata = read_safetensors(cfg)
    write_safetensors(cfg.with_name("phased.safetensors"), tensors, {**metadata, **stated})
    (folder / "models" / "checkpoints" / "broken.safetensors").write_bytes(b"PK\x03\x04 not what it says")
    return run_host(folder)
