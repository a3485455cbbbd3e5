"""What `export` puts into the real web UIs: it paints there, with the host's own sampler, what it paints here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from webui_harness import EMOJI, WebUI, difference

from lcm_core.diffusion.consistency import Denoiser
from lcm_core.diffusion.guidance import guide
from lcm_core.diffusion.samplers import initial_noise, sample_euler
from lcm_core.export.webui import webui_yaml
from lcm_core.files.checkpoint import Component, ModelInfo
from lcm_core.pipeline.model import load_model

pytestmark = pytest.mark.host
PROMPT = "a slice of pizza, noto style"
NEGATIVE = "a face, twemoji style"
LORA = EMOJI / "lora" / "lcm_lora.safetensors"


@torch.inference_mode()
def euler(
    model: str | Path, prompt: str, lora: bool = False, steps: int = 4, guidance_scale: float = 2.0
) -> Image.Image:
    """The host's sampler "Euler" on its schedule "Uniform": timesteps 999, 666, 333 and 0. Forge rounds others."""
    m = load_model(model, "cpu", "float32", unet="teacher", lora=[(LORA, 1.0)] if lora else ())
    sigmas = torch.cat([m.diffusion.process.t_to_sigma(torch.linspace(999, 0, steps)).float(), torch.zeros(1)])
    cond, negative = m.encode([prompt], 64, 64), m.encode([NEGATIVE], 64, 64)
    guided = guide(Denoiser(m.unet, m.diffusion), cond, negative, guidance_scale, None)
    latents = sample_euler(guided, initial_noise([1], (4, 8, 8)) * sigmas[0], sigmas, disable=True)
    pixels = ((m.vae.decode(latents)[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1) * 255
    return Image.fromarray(pixels.numpy().astype(np.uint8))


def host_euler(webui: WebUI, checkpoint: str, prompt: str) -> Image.Image:
    webui.load(checkpoint)
    painted = webui.paint(
        prompt=prompt, negative_prompt=NEGATIVE, sampler_name="Euler", scheduler="Uniform", steps=4, cfg_scale=2
    )
    assert painted.sampler == "Euler"
    return painted.pictures[0]


@pytest.mark.parametrize("prompt", [PROMPT, "Crème BRÛLÉE!! don't  stop \N{SLICE OF PIZZA}x2, noto-style"])
def test_the_embedded_teacher_paints_the_same_picture(webui: WebUI, prompt: str) -> None:
    """Weights, sizes, heads, schedule, tokenizer and text encoder, all at once."""
    assert difference(host_euler(webui, "emoji_teacher", prompt), euler("emoji", prompt)) <= 1


def test_the_other_prediction_type_too(webui: WebUI) -> None:
    assert difference(host_euler(webui, "other_teacher", PROMPT), euler(webui.data / "other", PROMPT)) <= 1


def test_the_lora_is_found_by_its_name_and_does_the_same(webui: WebUI) -> None:
    found = host_euler(webui, "emoji_teacher", f"{PROMPT} <lora:emoji_lcm_lora:1>")
    assert difference(found, euler("emoji", PROMPT, lora=True)) <= 1
    assert difference(found, euler("emoji", PROMPT)) > 8


def test_sd2_is_described_as_in_the_hosts_own_file(webui: WebUI) -> None:
    """Every argument that the host's v2-inference-v.yaml gives to the networks, we give too, with the same value."""
    files = list(webui.checkout.glob("repositories/*/configs/stable-diffusion/v2-inference-v.yaml"))
    if not files:
        pytest.skip("Forge has no such file")
    unet: dict[str, Any] = {
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
    }
    vae = json.loads((EMOJI / "vae" / "config.json").read_text(encoding="utf-8"))
    vae |= {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    components = {"unet": Component({}, unet), "vae": Component({}, vae)}
    own = yaml.safe_load(webui_yaml(components, ModelInfo("sd2", "v_prediction")))["model"]["params"]
    theirs = yaml.safe_load(files[0].read_text(encoding="utf-8"))["model"]["params"]
    assert own["parameterization"] == theirs["parameterization"]
    unused = {"use_checkpoint", "use_fp16", "image_size", "attention_resolutions"}
    expected = {key: value for key, value in theirs["unet_config"]["params"].items() if key not in unused}
    assert {key: own["unet_config"]["params"][key] for key in expected} == expected
    assert set(own["unet_config"]["params"]["attention_resolutions"]) == {1, 2, 4}
    assert own["cond_stage_config"] == theirs["cond_stage_config"]
    for key in ("ch", "ch_mult", "num_res_blocks", "z_channels", "attn_resolutions"):
        own_vae, their_vae = (x["first_stage_config"]["params"]["ddconfig"] for x in (own, theirs))
        assert own_vae[key] == their_vae[key]
