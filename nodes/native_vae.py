"""The embedded model's VAE for ComfyUI: at its own width where this package loads it, else the tiny one.

ComfyUI's loaders take every AutoencoderKL of a file for one of Stable Diffusion's size, which ours is not. A TAESD is
smaller than what they expect of it, so that one takes its place there: paler in detail, and many times as fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcm_core.files.checkpoint import read_component
from lcm_core.files.safetensors import read_json
from lcm_core.pipeline.sources import MODELS

_VAE = read_json(MODELS / "emoji" / "vae" / "config.json")
_PREFIX = "first_stage_model."
_LAYERS = _VAE["layers_per_block"]
_LATENTS = _VAE["latent_channels"]
_USUAL_WIDTH = 64
State = dict[str, Tensor]


class _Half(NamedTuple):
    """How a TAESD's half is laid out."""

    start: int
    """Number of the first layer with weights."""
    blocks: tuple[int, ...]
    """Blocks of each resolution."""
    between: int
    """Layers before them: a convolution in an encoder; in a decoder it has a layer without weights beside it."""


_LAYOUT = {"encoder": _Half(0, (1, 3, 3, 3), 1), "decoder": _Half(1, (3, 3, 3, 1), 2)}


def take_vae(state: State) -> State | None:
    """Take the embedded model's VAE, at its own width, out of a checkpoint's state dict; None if it is not there."""
    names = [name for name in state if name.startswith(_PREFIX)]
    found = {name.removeprefix(_PREFIX): state[name] for name in names}
    if not is_own(found):
        return None
    for name in names:
        del state[name]
    return found


def is_own(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of the embedded model's VAE at its own width."""
    channels = _VAE["block_out_channels"]
    widths = {"encoder.conv_in.weight": channels[0], "decoder.conv_in.weight": channels[-1]}
    is_narrow = all(name in state and state[name].shape[0] == width for name, width in widths.items())
    return is_narrow and f"encoder.down.0.block.{_LAYERS}.conv1.weight" not in state


def own_config() -> dict[str, Any]:
    """What tells the host's `VAE` to build it at its own width."""
    channels = _VAE["block_out_channels"]
    sizes = {
        "double_z": True,
        "z_channels": _VAE["latent_channels"],
        "resolution": _VAE["sample_size"],
        "in_channels": _VAE["in_channels"],
        "out_ch": _VAE["out_channels"],
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "num_res_blocks": _LAYERS,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"params": {"ddconfig": sizes, "embed_dim": _VAE["latent_channels"]}}


def as_taesd() -> State:
    """The embedded model's tiny VAE as a TAESD, which ComfyUI's loaders know at one size: 64 channels and up to three
    blocks at each resolution.

    Channels of zeros stay zero, and a block of zeros gives back what it is given, which a block before it has made
    positive; so the pictures are those of the tiny VAE.
    """
    component = read_component(MODELS / "emoji" / "vae_tiny", "vae")
    state: State = {"vae_scale": torch.tensor(_VAE["scaling_factor"]), "vae_shift": torch.tensor(0.0)}
    for half in ("encoder", "decoder"):
        blocks = component.config[f"num_{half}_blocks"]
        for number, own in enumerate(_own_layers(half, blocks), _LAYOUT[half].start):
            if own is None:
                state |= _idle_block(f"taesd_{half}.{number}")
                continue
            start = f"{half}.layers.{own}."
            layer = {name.removeprefix(start): w for name, w in component.tensors.items() if name.startswith(start)}
            state |= {f"taesd_{half}.{number}.{name}": _widen(weight.float()) for name, weight in layer.items()}
    return state


def _own_layers(half: str, blocks: Sequence[int]) -> list[int | None]:
    """For each layer of a TAESD's half, the number of the layer that stands there in ours; None for a missing block."""
    layout, numbers = _LAYOUT[half], count()
    layers: list[int | None] = [next(numbers) for _ in range(layout.between)]
    for stage, (ours, usual) in enumerate(zip(blocks, layout.blocks, strict=True), 1):
        layers += [next(numbers) if place < ours else None for place in range(usual)]
        layers += [next(numbers) for _ in range(layout.between if stage < len(blocks) else 1)]
    return layers


def _widen(weight: Tensor) -> Tensor:
    """Zeros for the channels that ours lacks, (O, ...) or (O, I, ...); 3 and 4 channels are colours and latents."""
    wide = [_USUAL_WIDTH if size > _LATENTS else size for size in weight.shape[:2]]
    padded = weight.new_zeros(*wide[: weight.ndim], *weight.shape[2:])
    padded[tuple(slice(size) for size in weight.shape)] = weight
    return padded


def _idle_block(name: str) -> State:
    """A residual block that adds nothing."""
    width = _USUAL_WIDTH
    weights = {f"{name}.conv.{i}.weight": torch.zeros(width, width, 3, 3) for i in (0, 2, 4)}
    return weights | {f"{name}.conv.{i}.bias": torch.zeros(width) for i in (0, 2, 4)}
