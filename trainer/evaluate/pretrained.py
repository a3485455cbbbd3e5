"""Networks that others publish for judging pictures: Inception for FID, CLIP for how well a picture fits its caption.

Both come from local paths that the user gives; nothing is downloaded.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.safetensors import check_finite, read_json, read_safetensors
from lcm_core.pipeline.image import load_image, to_pil

PathLike = str | os.PathLike[str]
Features = Callable[[Tensor], Tensor]
"""uint8 pictures (B, 3, H, W) -> features (B, D), float32 on the CPU."""
CaptionScore = Callable[[Tensor, Sequence[str]], Tensor]
"""uint8 pictures (B, 3, H, W) and their captions -> a score of each, (B,), float32 on the CPU."""
_INCEPTION_FEATURES = "2048"  # the last pooling layer, as in arXiv 1706.08500
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_inception(path: PathLike, device: torch.device) -> Features:
    """The Inception network of FID as torch-fidelity defines it, which torchmetrics uses too.

    Args:
        path: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`, converted to safetensors.
        device: where it runs.

    Raises:
        InputError: torch-fidelity is not installed, or the file is not those weights.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise InputError(f"Inception FID needs torch-fidelity ({error}); pip install torch-fidelity") from error
    tensors, _ = read_safetensors(path)
    check_finite(tensors, path)
    with tempfile.TemporaryDirectory() as folder:
        # Its constructor reads a pickle and nothing else; this one holds our own tensors only.
        pickle = Path(folder) / "inception.pth"
        torch.save(tensors, pickle)
        try:
            network = FeatureExtractorInceptionV3("inception", [_INCEPTION_FEATURES], str(pickle)).to(device)
        except RuntimeError as error:
            raise InputError(f"{path} does not hold torch-fidelity's Inception weights; convert that file") from error

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        return network(pictures.to(device))[0].float().cpu()

    return features


def load_clip(path: PathLike, device: torch.device) -> CaptionScore:
    """CLIP score: 100 * max(cos(picture, caption), 0) (arXiv 2104.08718 Eq. 1, with torchmetrics' weight of 100).

    Args:
        path: folder of a transformers CLIPModel with its tokenizer, weights in safetensors.
        device: where it runs.

    Raises:
        InputError: there is no such model.
    """
    model, tokenizer = _read_clip(Path(path))
    model = model.to(device).eval().requires_grad_(False)
    side = model.config.vision_config.image_size
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in _clip_colours(Path(path)))

    @torch.no_grad()
    def score(pictures: Tensor, captions: Sequence[str]) -> Tensor:
        pixels = torch.cat([load_image(picture, (side, side)) for picture in to_pil(pictures.float() / 127.5 - 1)])
        words = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt").to(device)
        output = model(pixel_values=(((pixels + 1) / 2 - mean) / std).to(device), **words)
        return 100 * F.cosine_similarity(output.image_embeds, output.text_embeds).clamp(min=0).float().cpu()

    return score


def _read_clip(path: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, CLIPModel

    kind = read_json(path / "config.json").get("model_type")
    if kind != "clip":
        raise InputError(f"{path} holds a model of type {kind!r}; give a folder with a CLIP model of transformers")
    try:
        model = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
        return model, AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path} is no complete CLIP model ({reason}); give a folder with config.json, model.safetensors and "
            "the tokenizer's files"
        ) from error


def _clip_colours(path: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and spread of the colours that the model was trained with; OpenAI's where the folder does not say."""
    file = path / "preprocessor_config.json"
    stated = read_json(file) if file.is_file() else {}
    return stated.get("image_mean", _CLIP_MEAN), stated.get("image_std", _CLIP_STD)
