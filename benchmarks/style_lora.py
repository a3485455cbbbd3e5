"""A style LoRA for the embedded model, to be made fast: its teacher learns the one style of drawing that it never saw.

    python benchmarks/style_lora.py --icons node_modules --output style      # minutes on a CPU
    python -m trainer accelerate --teacher emoji --lora style/ink.safetensors --prompts style/prompts.txt

`--icons` is the folder with the icon packages (`trainer.recipes.emoji.icons`); without it npm fetches them. The output
holds the LoRA and a file of prompts; stopped, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lcm_core.files.lora import save_lora
from lcm_core.networks.unet import set_attention
from lcm_core.pipeline.model import diffusion_of
from lcm_core.pipeline.parts import open_vae
from lcm_core.pipeline.sources import find_source
from trainer.recipes.emoji.autoencoder import to_unit
from trainer.recipes.emoji.data import STYLE_HELD_OUT, Drawings
from trainer.recipes.emoji.icons import load_drawings
from trainer.recipes.emoji.latents import CaptionedLatents
from trainer.recipes.emoji.stages import LORA_RANK, STAGES
from trainer.recipes.emoji.style import train_style
from trainer.recipes.emoji.teacher import DIFFUSION

PROMPTS = 512


def main() -> None:
    """Render, encode, train, write."""
    from transformers import CLIPTextModel, CLIPTokenizer

    options = read_options()
    source, device = find_source("emoji", "teacher"), torch.device("cpu")
    assert diffusion_of(source.info).prediction_type == DIFFUSION.prediction_type
    drawings = load_drawings(options.output / "data", source.recommended.resolution or 64, options.icons)
    tokenizer: Any = CLIPTokenizer.from_pretrained(source.root / "tokenizer")
    data = encode(drawings, open_vae(source, device, torch.float32), tokenizer)
    teacher = {"unet": load_teacher(source.unet), "text_encoder": CLIPTextModel.from_pretrained(source.text)}
    config = replace(STAGES["style"], steps=options.steps, warmup_steps=min(200, options.steps))
    tensors = train_style(data, teacher, config, LORA_RANK, options.output / "run", device)
    save_lora(options.output / f"{STYLE_HELD_OUT}.safetensors", tensors, source.info.family)
    write_prompts(options.output / "prompts.txt", drawings, data.chosen)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/style"), help="folder of LoRA, prompts and state")
    parser.add_argument("--icons", type=Path, help="node_modules with the icon packages (default: fetched with npm)")
    parser.add_argument("--steps", type=int, default=STAGES["style"].steps, help="of training")
    return parser.parse_args()


def encode(drawings: Drawings, vae: Any, tokenizer: Any) -> CaptionedLatents:
    """Latents of the drawings of the style, with what is needed to caption them."""
    chosen = torch.tensor([i for i, entry in enumerate(drawings.entries) if entry.style == STYLE_HELD_OUT])
    size = drawings.images.shape[-1]
    with torch.no_grad():
        parts = [vae.encode(to_unit(drawings.on_white(part))) for part in chosen.split(64)]
    return CaptionedLatents({size: torch.cat(parts)}, chosen, {size: []}, drawings, tokenizer)


def load_teacher(folder: Path) -> Any:
    """The embedded teacher's U-Net, to be trained."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    set_attention(unet, "bmm")
    return unet


def write_prompts(file: Path, drawings: Drawings, chosen: torch.Tensor) -> None:
    """Names of things, evenly from all groups; that they are to be drawn in the style is the LoRA's part."""
    labels = list(dict.fromkeys(drawings.entries[i].label for i in chosen.tolist()))
    count = min(PROMPTS, len(labels))
    lines = [f"{labels[i * len(labels) // count]}, {STYLE_HELD_OUT} style\n" for i in range(count)]
    file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
