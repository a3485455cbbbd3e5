"""A Stable Diffusion checkpoint with random weights, and random pictures with captions, to measure the trainer with.

    python benchmarks/random_model.py work                # Stable Diffusion 1.5's size: 2 GB on disk, 5 GB of memory
    python benchmarks/random_model.py work --size tiny    # seconds
    python -m trainer distill --teacher work/model --data work/photos --output work/out

Nothing is downloaded. Random weights take as long, and as much memory, as trained ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy
import torch
from cpu_sd15 import SIZES, make_tokenizer, silence_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder for model/ and photos/")
    parser.add_argument("--size", choices=SIZES, default="sd15", help="architecture (default sd15)")
    parser.add_argument("--pictures", type=int, default=4, help="how many (default 4)")
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels (default 256)")
    args = parser.parse_args()
    silence_libraries()
    args.folder.mkdir(parents=True)
    make_teacher(args.folder / "model", SIZES[args.size])
    make_photos(args.folder / "photos", args.pictures, args.side)
    print(f"{args.folder / 'model'}: {args.size}, random weights; {args.folder / 'photos'}: {args.pictures} pictures")


def make_teacher(folder: Path, size: dict[str, dict[str, Any]]) -> None:
    """Write a plain model, no LCM, as a diffusers folder in float16."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    tokenizer = make_tokenizer(folder / "tokenizer")
    StableDiffusionPipeline(
        **make_networks(size, len(tokenizer)),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder)


def make_networks(size: dict[str, dict[str, Any]], words: int) -> dict[str, Any]:
    """U-Net, VAE and text encoder of one of `SIZES`, with a vocabulary of `words`."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(vocab_size=words, bos_token_id=words - 2, eos_token_id=words - 1, **size["text"])
    downs, ups = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    return {
        "unet": UNet2DConditionModel(**size["unet"]),
        "vae": AutoencoderKL(latent_channels=4, down_block_types=downs, up_block_types=ups, **size["vae"]),
        "text_encoder": CLIPTextModel(text),
    }


def make_photos(folder: Path, count: int, side: int) -> None:
    """Pictures of noise, each with its caption."""
    from PIL import Image

    folder.mkdir()
    generator = numpy.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 256, (side, side, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.png")
        (folder / f"{number:04}.txt").write_text(f"picture number {number}")


if __name__ == "__main__":
    main()
