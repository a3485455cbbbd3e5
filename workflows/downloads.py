"""Example workflows on well-known models, which are to be downloaded first: ComfyUI's page offers the links."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graph import Graph, Link

HUB = "https://huggingface.co"
MODELS = {
    "v1-5-pruned-emaonly-fp16.safetensors": (
        "checkpoints",
        f"{HUB}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
    ),
    "sd_xl_base_1.0.safetensors": (
        "checkpoints",
        f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
    ),
    "lcm-lora-sdv1-5.safetensors": (
        "loras",
        f"{HUB}/latent-consistency/lcm-lora-sdv1-5/resolve/main/pytorch_lora_weights.safetensors",
    ),
    "lcm-lora-sdxl.safetensors": (
        "loras",
        f"{HUB}/latent-consistency/lcm-lora-sdxl/resolve/main/pytorch_lora_weights.safetensors",
    ),
    "qwen_image_fp8_e4m3fn.safetensors": (
        "diffusion_models",
        f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/diffusion_models/qwen_image_fp8_e4m3fn.safetensors",
    ),
    "qwen_2.5_vl_7b_fp8_scaled.safetensors": (
        "text_encoders",
        f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
    ),
    "qwen_image_vae.safetensors": (
        "vae",
        f"{HUB}/Comfy-Org/Qwen-Image_ComfyUI/resolve/main/split_files/vae/qwen_image_vae.safetensors",
    ),
    "Qwen-Image-Lightning-4steps-V1.0.safetensors": (
        "loras",
        f"{HUB}/lightx2v/Qwen-Image-Lightning/resolve/main/Qwen-Image-Lightning-4steps-V1.0.safetensors",
    ),
}
"""The folder in ComfyUI's models, and the address, of each file."""
_PROMPT = "a lighthouse on a cliff at dawn, waves, soft light, photograph"


def sd15(g: Graph) -> None:
    """# SD 1.5 in 4 steps with its LCM-LoRA

    An ordinary SD 1.5 checkpoint, 512 x 512.

    - **Download**: the page offers both files. Save the LoRA as *lcm-lora-sdv1-5.safetensors* in *models/loras*.
    - **Your own model**: any SD 1.5 checkpoint; style LoRAs go between the loader and *LCM-LoRA*.
    - **guidance_scale**: 1 to 2. Above 1 each step takes twice the time and the negative prompt is used.
    """
    _with_lora(g, "v1-5-pruned-emaonly-fp16.safetensors", "lcm-lora-sdv1-5.safetensors", 512, "sd15")


def sdxl(g: Graph) -> None:
    """# SDXL in 4 steps with its LCM-LoRA

    An ordinary SDXL checkpoint, 1024 x 1024.

    - **Download**: the page offers both files. Save the LoRA as *lcm-lora-sdxl.safetensors* in *models/loras*.
    - **Your own model**: any SDXL checkpoint; style LoRAs go between the loader and *LCM-LoRA*.
    - **guidance_scale**: 1 to 2. Above 1 each step takes twice the time and the negative prompt is used.
    """
    _with_lora(g, "sd_xl_base_1.0.safetensors", "lcm-lora-sdxl.safetensors", 1024, "sdxl")


def qwen_image(g: Graph) -> None:
    """# Qwen-Image, a flow model, in 4 steps

    Any flow model that ComfyUI loads works like this one: its own loader, a few-step LoRA of its family, and *LCM
    KSampler*.

    - **Download**: the page offers the four files.
    - **Your own model**: load it with the stock nodes; the shift that its LoRA was trained with goes into
      *ModelSamplingAuraFlow* or the family's own node.
    - **sampler** *lcm* makes noise anew in each step; *tcd* with gamma 0 adds none.
    """
    loading = {"unet_name": "qwen_image_fp8_e4m3fn.safetensors", "weight_dtype": "default"}
    model = g.add("UNETLoader", "Load Diffusion Model", **loading)[0]
    words = {"clip_name": "qwen_2.5_vl_7b_fp8_scaled.safetensors", "type": "qwen_image", "device": "default"}
    clip = g.add("CLIPLoader", "Load CLIP", **words)[0]
    vae = g.add("VAELoader", "Load VAE", vae_name="qwen_image_vae.safetensors")[0]
    lora = {"lora_name": "Qwen-Image-Lightning-4steps-V1.0.safetensors", "strength_model": 1.0}
    model = g.add("LoraLoaderModelOnly", "4-step LoRA", model=model, **lora)[0]
    model = g.add("ModelSamplingAuraFlow", "Shift", model=model, shift=3.0)[0]
    latent = g.add("EmptySD3LatentImage", "Size", width=1328, height=1328, batch_size=1)[0]
    painted = g.paint(model, g.text(clip, _PROMPT), latent, guidance_scale=1.0)
    g.save(painted, vae, "qwen image")


def _with_lora(g: Graph, checkpoint: str, lora: str, size: int, name: str) -> None:
    model, clip, vae, *_ = g.add("LCMCheckpointLoader", "Any checkpoint", ckpt_name=checkpoint)
    settings = {"lora_name": lora, "strength_model": 1.0, "strength_clip": 1.0, "save_as": ""}
    model = g.add("LCMLoraConvert", "LCM-LoRA", model=model, **settings)[0]
    positive, negative = g.text(clip, _PROMPT), g.text(clip, "blurry", "Negative prompt")
    painted = g.paint(model, positive, g.canvas(1, size), negative=negative, guidance_scale=1.5)
    g.save(painted, vae, name)


DOWNLOADS: dict[str, Callable[[Graph], None]] = {
    "LCM 12 SD 1.5 in 4 steps (download)": sd15,
    "LCM 13 SDXL in 4 steps (download)": sdxl,
    "LCM 14 Qwen-Image in 4 steps (download)": qwen_image,
}


def with_links(drawn: dict[str, Any]) -> dict[str, Any]:
    """A drawn graph whose loaders name the files to download, as the templates of ComfyUI do."""
    for node in drawn["nodes"]:
        names = [value for value in node.get("widgets_values") or () if value in MODELS]
        if names:
            links: list[Link] = node["properties"].setdefault("models", [])
            links += [{"name": name, "url": MODELS[name][1], "directory": MODELS[name][0]} for name in names]
    return drawn
