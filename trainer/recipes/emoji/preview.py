"""Pictures of how far the recipe's training is, from the states that it saves while it runs.

python -m trainer.recipes.emoji.preview --work runs/emoji
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from trainer.recipes.emoji import AnyModule
from trainer.recipes.emoji.autoencoder import SCALING_FACTOR, build_vae, encode_mean, held_out_sample
from trainer.recipes.emoji.icons import load_drawings
from trainer.recipes.emoji.teacher import DIFFUSION, build_unet
from trainer.recipes.emoji.words import build_text_encoder, build_tokenizer, tokenize

PROMPTS = (
    "red apple, noto style",
    "pizza, twemoji style",
    "cat face, fluent style",
    "rocket, gradient style",
    "grinning face, emojione style",
    "octopus, blob style",
    "bicycle, silhouette style",
    "two red apples on a light blue ground, noto style",
)
STEPS = 25
"""Steps of the deterministic sampler."""


def averaged(folder: Path, network: AnyModule, prefix: str = "") -> AnyModule:
    """The network with its moving average from a stage's state.

    Raises:
        InputError: the stage has not saved a state yet.
    """
    path = folder / "state.safetensors"
    if not path.exists():
        raise InputError(f"{path} does not exist yet; let the recipe run until it saves for the first time")
    start = f"ema.{prefix}"
    tensors = {name[len(start) :]: t for name, t in read_safetensors(path)[0].items() if name.startswith(start)}
    network.load_state_dict(tensors, strict=False)  # position numbers are no weights
    return network.eval().requires_grad_(False)


@torch.no_grad()
def paint(unet: AnyModule, context: Tensor, null: Tensor, pixels: int, guidance_scale: float) -> Tensor:
    """Latents (B, 4, h, w) for text embeddings (B, 77, D), by DDIM."""
    x = torch.randn(len(context), 4, pixels // 8, pixels // 8, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(999, 0, STEPS + 1).long()
    for t, until in pairwise(times):
        both = unet(torch.cat([x, x]), t, torch.cat([context, null.expand_as(context)])).sample
        with_text, without = both.chunk(2)
        output = without + guidance_scale * (with_text - without)
        x = DIFFUSION.jump(output, x, t.expand(len(x)), until.expand(len(x)))
    return x


def save_grid(path: Path, rows: list[Tensor]) -> None:
    """Rows of pictures (B, 3, S, S) in [-1, 1], one above the other, as a PNG."""
    from einops import rearrange
    from PIL import Image

    strips = [rearrange(row, "b c h w -> h (b w) c") for row in rows]
    pixels = ((torch.cat(strips) + 1) * 127.5).clamp(0, 255).byte()
    Image.fromarray(pixels.cpu().numpy()).save(path)


def preview_vae(work: Path, size: int) -> Path:
    """Held-out drawings, and below them what the VAE makes of them."""
    drawings = load_drawings(work / "data", size)
    vae = averaged(work / f"vae-{size}", build_vae())
    images = drawings.on_white(held_out_sample(drawings, 16))
    with torch.no_grad():
        again = vae.decode(encode_mean(vae, images, torch.device("cpu"))).sample
    path = work / "vae.png"
    real = images.float() / 127.5 - 1
    save_grid(path, [part for pair in zip(real.split(8), again.split(8), strict=True) for part in pair])
    return path


@torch.no_grad()
def preview_teacher(work: Path, size: int, guidance_scale: float) -> Path:
    """What the teacher paints of `PROMPTS`, at half the size and at the full one."""
    from diffusers import AutoencoderKL

    folder = work / f"teacher-{size}"
    tokenizer = build_tokenizer(load_drawings(work / "data", size), work / "tokenizer")
    text_encoder = averaged(folder, build_text_encoder(len(tokenizer)), "text_encoder.")
    unet = averaged(folder, build_unet(), "unet.")
    vae = AutoencoderKL.from_pretrained(work / f"vae-{size}" / "result" / "vae")
    context = text_encoder(tokenize(tokenizer, [*PROMPTS, ""])).last_hidden_state
    for pixels in (size // 2, size):
        latents = paint(unet, context[:-1], context[-1:], pixels, guidance_scale)
        save_grid(work / f"teacher-{pixels}.png", [vae.decode(latents / SCALING_FACTOR).sample])
    return work / f"teacher-{size}.png"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Show what the emoji recipe's networks have learnt so far.")
    parser.add_argument("--work", type=Path, default=Path("runs/emoji"), help="the recipe's folder")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    args = parser.parse_args()
    print(preview_vae(args.work, args.size))
    if (args.work / f"teacher-{args.size}" / "state.safetensors").exists():
        print(preview_teacher(args.work, args.size, args.guidance_scale))


if __name__ == "__main__":
    main()
