"""Names of the same weight in single files (the ldm layout) and in diffusers folders; plain strings, no tensors.

A *prefix map* is a dict from a module's name in the ldm layout to its name in the diffusers layout. A key is renamed by
its longest mapped prefix, so one entry for a transformer serves all weights below it, whose names are the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
# Component -> the prefixes that its text encoder has been given, by the layout below the prefix.
CLIP_PREFIXES: dict[str, tuple[str, ...]] = {
    "text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
}
OPENCLIP_PREFIXES: dict[str, tuple[str, ...]] = {
    "text_encoder": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
# Training state, schedules that are recomputed, and markers: not weights of any network.
IGNORED = re.compile(
    r"(betas|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recip(m1)?_alphas_cumprod|posterior_\w+|logvar|lvlb_weights"
    r"|scale_factor|denoiser\..*|model_ema\..*|loss\..*|first_stage_model\.loss\..*|v_pred|ztsnr"
    r"|lcm_suite\..*)$"
)

_MOST_PARTS = 128
"""Levels, layers or blocks that a network may have, each counted in its own place."""
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# Folders written before diffusers 0.12 used these names.
VAE_ATTENTION_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OPENCLIP_ENDS = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
}
_OPENCLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


@dataclass(frozen=True)
class UNetTopology:
    """How the blocks of a U-Net follow each other: enough to number them."""

    layers: int
    """Residual blocks per level on the way down; the way up has one more."""
    attention: tuple[bool, ...]
    """Whether each level, finest first, holds transformers."""

    @classmethod
    def from_diffusers(cls, keys: Iterable[str]) -> UNetTopology:
        """Read it from the key (or module) names of a diffusers U-Net."""
        names = set(keys)
        levels = count(names, r"down_blocks\.(\d+)\.")
        attention = tuple(any(k.startswith(f"down_blocks.{i}.attentions.") for k in names) for i in range(levels))
        return cls(count(names, r"down_blocks\.0\.resnets\.(\d+)\."), attention)

    @classmethod
    def from_ldm(cls, keys: Iterable[str]) -> UNetTopology:
        """Read it from the key names of an ldm U-Net, without the `model.diffusion_model.` prefix."""
        names = set(keys)
        attention, layers, in_level = [False], 0, 0
        for n in range(1, count(names, r"input_blocks\.(\d+)\.")):
            if f"input_blocks.{n}.0.op.weight" in names:
                attention.append(False)
                in_level = 0
                continue
            in_level += 1
            layers = max(layers, in_level)
            attention[-1] |= any(k.startswith(f"input_blocks.{n}.1.") for k in names)
        return cls(layers, tuple(attention))


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern`'s group finds at the start of a name; 0 when nothing matches.

    A number that no network has so many parts for is passed over; its weights are then none of the network's.
    """
    found = (re.match(pattern, name) for name in names)
    numbers = (int(match.group(1)) for match in found if match and len(match.group(1)) <= len(str(_MOST_PARTS)))
    return max((number + 1 for number in numbers if number < _MOST_PARTS), default=0)


def unet_map(topology: UNetTopology) -> dict[str, str]:
    """Prefix map of an SD 1.x, 2.x or XL U-Net, `time_embed.cond_proj` of a guidance-conditioned LCM included."""
    resnets: dict[str, str] = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    others: dict[str, str] = {**_UNET_ENDS, "middle_block.1": "mid_block.attentions.0"}
    last, n = len(topology.attention) - 1, 1
    for level, attention in enumerate(topology.attention):
        for layer in range(topology.layers):
            resnets[f"input_blocks.{n}.0"] = f"down_blocks.{level}.resnets.{layer}"
            if attention:
                others[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{layer}"
            n += 1
        if level < last:
            others[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            n += 1
    n = 0
    for block, attention in enumerate(reversed(topology.attention)):
        for layer in range(topology.layers + 1):
            resnets[f"output_blocks.{n}.0"] = f"up_blocks.{block}.resnets.{layer}"
            if attention:
                others[f"output_blocks.{n}.1"] = f"up_blocks.{block}.attentions.{layer}"
            n += 1
        if block < last:
            others[f"output_blocks.{n - 1}.{1 + attention}.conv"] = f"up_blocks.{block}.upsamplers.0.conv"
    leaves = {f"{ldm}.{a}": f"{diffusers}.{b}" for ldm, diffusers in resnets.items() for a, b in _RESNET.items()}
    return {**others, **leaves}


def vae_map(levels: int, layers: int) -> dict[str, str]:
    """Prefix map of an AutoencoderKL with `levels` resolutions and `layers` residual blocks per encoder level."""
    pairs = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    resnets: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        pairs |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        pairs[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        pairs |= {f"{half}.mid.attn_1.{a}": f"{half}.mid_block.attentions.0.{b}" for a, b in _VAE_ATTENTION.items()}
        resnets |= {f"{half}.mid.block_{i + 1}": f"{half}.mid_block.resnets.{i}" for i in range(2)}
    for i in range(levels):
        up = levels - 1 - i  # ldm counts the decoder's levels from the finest, diffusers from the coarsest
        resnets |= {f"encoder.down.{i}.block.{j}": f"encoder.down_blocks.{i}.resnets.{j}" for j in range(layers)}
        resnets |= {f"decoder.up.{i}.block.{j}": f"decoder.up_blocks.{up}.resnets.{j}" for j in range(layers + 1)}
        pairs[f"encoder.down.{i}.downsample.conv"] = f"encoder.down_blocks.{i}.downsamplers.0.conv"
        pairs[f"decoder.up.{i}.upsample.conv"] = f"decoder.up_blocks.{up}.upsamplers.0.conv"
    leaves = ("norm1", "conv1", "norm2", "conv2")
    pairs |= {f"{ldm}.{leaf}": f"{diffusers}.{leaf}" for ldm, diffusers in resnets.items() for leaf in leaves}
    return pairs | {f"{a}.nin_shortcut": f"{b}.conv_shortcut" for a, b in resnets.items()}


def openclip_map(layers: int) -> dict[str, str]:
    """Prefix map of OpenCLIP's text tower; its joint `in_proj` and bare parameters need tensors, see `layouts`."""
    pairs = dict(_OPENCLIP_ENDS)
    for i in range(layers):
        ldm, diffusers = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        pairs |= {f"{ldm}.{a}": f"{diffusers}.{b}" for a, b in _OPENCLIP_LAYER.items()}
    return pairs


def inverted(prefixes: Mapping[str, str]) -> dict[str, str]:
    """The same map for the way back."""
    return {b: a for a, b in prefixes.items()}


def rename(key: str, prefixes: Mapping[str, str]) -> str | None:
    """The key under its new name, by its longest mapped prefix; None when no prefix of it is mapped."""
    head = key
    while head:
        if head in prefixes:
            return prefixes[head] + key[len(head) :]
        head = head.rpartition(".")[0]
    return None
