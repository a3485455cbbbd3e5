"""diffusers' own pipelines of the tiny models, to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def diffusers_pipeline(kind: str, folder: Path, **parts: Any) -> Any:
    """A pipeline of this class, with LCMScheduler, `parts` beside or in place of the model's own."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    usual = {
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "scheduler": diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    pipe = getattr(diffusers, kind)(**usual | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
