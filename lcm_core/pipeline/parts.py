"""Loading a model's networks, whichever family it is of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lcm_core.errors import InputError
from lcm_core.families.labels import ClassLabels, read_labels
from lcm_core.families.network import FamilyNetwork, TransformerText, load_family_network
from lcm_core.files.checkpoint import ModelInfo
from lcm_core.files.safetensors import PathLike, read_json
from lcm_core.networks.device import choose_dtype
from lcm_core.networks.text_encoder import TextEncoder, load_text
from lcm_core.networks.unet import UNet, load_unet
from lcm_core.networks.vae import VAE, load_vae
from lcm_core.pipeline.sources import ModelSource, find_vae

Dtype = str | torch.dtype | None
DenoisingNetwork = UNet | FamilyNetwork
Text = TextEncoder | TransformerText | ClassLabels

_SDXL_SCALING_FACTOR = 0.13025


def open_network(
    source: ModelSource, device: torch.device, dtype: Dtype = None, memory_format: torch.memory_format | None = None
) -> DenoisingNetwork:
    """The network that predicts, frozen and in evaluation mode.

    Raises:
        InputError: it is missing or broken.
    """
    if source.family is None:
        return UNet(load_unet(source.opened or source.unet, device, dtype, memory_format))
    return load_family_network(source.family, source.unet, source.scheduler, device, choose_dtype(device, dtype))


def as_network(source: ModelSource, model: Any) -> DenoisingNetwork:
    """A network of this model that is loaded already, ready to be called."""
    if source.family is None:
        return UNet(model)
    return FamilyNetwork(model, source.family, source.scheduler)


def open_text(
    source: ModelSource,
    device: torch.device,
    dtype: Dtype = None,
    tokenizer: PathLike | None = None,
    clip_skip: int = 0,
    embedding: Sequence[PathLike] = (),
) -> Text:
    """The text encoders, or a class-conditional model's labels.

    Args:
        dtype: None chooses. Those of flow models have billions of weights, and run in bfloat16 where that is quick. On
            a CPU, CLIP stays in float32, in which prompts cost little, and nothing runs in float16.
        tokenizer: folder with CLIP's words, for single files that have none beside them.
        clip_skip: see `TextEncoder`.
        embedding: files of textual inversions.

    Raises:
        InputError: they are missing or broken, have no layers that could be skipped, or a textual inversion is for
            another kind of model.
    """
    if device.type == "cpu" and (source.family is None or choose_dtype(device, dtype) == torch.float16):
        dtype = None
    if source.family is None:
        return load_text(source.opened or source.text, device, dtype, tokenizer, clip_skip, embedding)
    check_clip_skip(source, clip_skip)
    if embedding:
        raise InputError(
            f"embedding {embedding[0]} cannot be used: {source.root} has other text encoders than CLIP's; leave it out"
        )
    if source.family.count_labels is not None:
        return open_labels(source, device)
    return TransformerText(source.family, source.root, device, choose_dtype(device, dtype))


def open_labels(source: ModelSource, device: torch.device) -> ClassLabels:
    """The classes of a class-conditional model.

    Raises:
        InputError: its index names labels that its network does not have.
    """
    assert source.family is not None
    assert source.family.count_labels is not None
    return read_labels(source.root, *source.family.count_labels(read_json(source.unet / "config.json")), device)


def open_vae(
    source: ModelSource,
    device: torch.device,
    dtype: Dtype = None,
    memory_format: torch.memory_format | None = None,
    path: PathLike | None = None,
) -> VAE:
    """The VAE, or another one: by its path, or "tiny" where the model has a tiny one beside it.

    Raises:
        InputError: it is missing, broken, or of another kind.
    """
    if source.family is not None:
        number = None if dtype is None else choose_dtype(device, dtype)
        folder = source.root / "vae" if path is None else find_vae(path, source.root)
        return source.family.load_vae(folder, device, number)
    check_has_vae(source, path)
    other = None if path is None else find_vae(path, source.root)
    vae = load_vae(other or source.opened or source.vae, device, dtype, memory_format)
    if other is not None and _is_bare_sdxl(source.info, other) and "block_out_channels" in vae.model.config:
        vae.scaling_factor = _SDXL_SCALING_FACTOR  # a bare file cannot say it, and looks like one of SD 1.x
    return vae


def check_clip_skip(source: ModelSource, clip_skip: int) -> None:
    """Refuse to skip layers of a flow model's text encoders.

    Raises:
        InputError: says so.
    """
    if clip_skip and source.family is not None:
        raise InputError(f"clip_skip is for Stable Diffusion; {source.root} is a flow model, leave it out")


def check_has_vae(source: ModelSource, path: PathLike | None = None) -> None:
    """Refuse a single file that has no VAE, where no other one is given.

    Raises:
        InputError: says how to give one.
    """
    if path is None and source.opened is not None and "vae" not in source.opened.names:
        raise InputError(f"{source.vae} has no VAE; give one with --vae PATH (vae=), e.g. that of the model it is from")


def _is_bare_sdxl(info: ModelInfo, path: Path) -> bool:
    return info.family == "sdxl" and path.is_file()
