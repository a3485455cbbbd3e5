"""The embedded model's VAE at the one width at which ComfyUI builds an AutoencoderKL: more weights, the same pictures.

ComfyUI's loaders take every AutoencoderKL of a file for Stable Diffusion's. The embedded one is laid out like that one,
but each layer has a fraction of the channels and each level a residual block less. Each channel is therefore repeated
beside itself, which leaves the means and variances of every group as they are, and the missing blocks add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lcm_core.files.safetensors import read_json
from lcm_core.pipeline.sources import MODELS

_VAE = read_json(MODELS / "emoji" / "vae" / "config.json")
_PREFIX = "first_stage_model."
_REPEATS = 128 // _VAE["block_out_channels"][0]  # 128: the finest level of Stable Diffusion's
_LAYERS = _VAE["layers_per_block"]
_USUAL_LAYERS = 2
_NARROW_IN = ("encoder.conv_in", "decoder.conv_in", "quant_conv", "post_quant_conv")
_NARROW_OUT = ("encoder.conv_out", "decoder.conv_out", "quant_conv", "post_quant_conv")
State = dict[str, Tensor]


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


def to_usual_width(state: Mapping[str, Tensor]) -> State:
    """The embedded model's VAE as one of Stable Diffusion's sizes, which encodes and decodes as it does.

    Args:
        state: weights in the ldm layout, without a prefix.
    """
    wide = {name: _widen(name, weight) for name, weight in state.items()}
    for level in range(len(_VAE["block_out_channels"])):
        for half, layers in ((f"encoder.down.{level}", 0), (f"decoder.up.{level}", 1)):
            last = f"{half}.block.{_LAYERS + layers - 1}"
            for layer in range(_LAYERS + layers, _USUAL_LAYERS + layers):
                wide |= _idle_block(f"{half}.block.{layer}", wide[f"{last}.conv2.weight"])
    return wide


def _widen(name: str, weight: Tensor) -> Tensor:
    module = name.rpartition(".")[0]
    if module not in _NARROW_OUT:
        weight = weight.repeat_interleave(_REPEATS, 0)
    if weight.ndim > 1 and module not in _NARROW_IN:
        weight = weight.repeat_interleave(_REPEATS, 1) / _REPEATS
    # A query times a key is a sum over the channels, divided by the square root of their number.
    return weight / math.sqrt(_REPEATS) if module.endswith(".attn_1.q") else weight


def _idle_block(name: str, convolution: Tensor) -> State:
    """A residual block whose residual is 0, of the width of another's last convolution."""
    weights = {f"{name}.conv{i}.weight": convolution.new_zeros(convolution.shape) for i in (1, 2)}
    vectors = [f"{name}.{part}" for part in ("norm1.weight", "norm2.weight")]
    vectors += [f"{name}.{part}.bias" for part in ("norm1", "norm2", "conv1", "conv2")]
    return {**weights, **{vector: convolution.new_zeros(len(convolution)) for vector in vectors}}
