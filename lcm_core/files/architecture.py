"""What the shapes of the weights say about a network: its family, and the configuration to build it from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.ldm_keys import UNetTopology, count

Family = Literal["sd1", "sd2", "sdxl"]
SAMPLE_SIZES = {"sd1": 64, "sd2": 96, "sdxl": 128}  # in latent pixels
_SD2_TEXT_LAYERS = 23


def unet_family(unet: Mapping[str, Tensor]) -> Family:
    """Which Stable Diffusion a U-Net in diffusers' layout belongs to.

    SDXL adds an embedding of pooled text and sizes; SD 2.x projects into its transformers with linear layers, SD 1.x
    with 1x1 convolutions.

    Raises:
        InputError: it is none of them.
    """
    if "conv_in.weight" not in unet or not any(k.endswith(".proj_in.weight") for k in unet):
        first = next(iter(unet), "nothing")
        raise InputError(f"unknown architecture (first weight: '{first}'); give an SD 1.x, SD 2.x or SDXL model")
    if "add_embedding.linear_1.weight" in unet:
        return "sdxl"
    return "sd2" if _is_linear(unet) else "sd1"


def unet_config(unet: Mapping[str, Tensor]) -> dict[str, Any]:
    """Configuration of a UNet2DConditionModel with these weights (diffusers' layout).

    The number of attention heads leaves no trace in the shapes: SD 1.x has 8 everywhere, SD 2.x and SDXL have heads of
    64 channels. A small model with other heads must say so in its metadata.
    """
    family = unet_family(unet)
    topology = UNetTopology.from_diffusers(unet)
    levels = len(topology.attention)
    channels = [unet[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": SAMPLE_SIZES[family],
        "in_channels": unet["conv_in.weight"].shape[1],
        "out_channels": unet["conv_out.weight"].shape[0],
        "block_out_channels": channels,
        "layers_per_block": topology.layers,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in topology.attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(topology.attention)],
        "cross_attention_dim": next(v.shape[1] for k, v in unet.items() if k.endswith(".attn2.to_k.weight")),
        "transformer_layers_per_block": _depths(unet, topology),
        "attention_head_dim": 8 if family == "sd1" else [max(c // 64, 1) for c in channels],
        "use_linear_projection": _is_linear(unet),
    }
    if family == "sdxl":
        width = unet["add_embedding.linear_1.weight"].shape[1]
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        config["projection_class_embeddings_input_dim"] = width
    if "time_embedding.cond_proj.weight" in unet:
        config["time_cond_proj_dim"] = unet["time_embedding.cond_proj.weight"].shape[1]
    return config


def vae_config(vae: Mapping[str, Tensor], family: Family | None = None) -> dict[str, Any]:
    """Configuration of the AutoencoderKL (or AutoencoderTiny) with these weights (diffusers' layout)."""
    if "encoder.layers.0.weight" in vae:
        return _tiny_vae_config(vae)
    levels = count(vae, r"encoder\.down_blocks\.(\d+)\.")
    if not levels or "decoder.conv_in.weight" not in vae:
        raise InputError(
            f"not a VAE (first weight: '{next(iter(vae), 'nothing')}'); give an AutoencoderKL or a tiny VAE"
        )
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": vae["encoder.conv_in.weight"].shape[1],
        "out_channels": vae["decoder.conv_out.weight"].shape[0],
        "latent_channels": vae["decoder.conv_in.weight"].shape[1],
        "block_out_channels": [vae[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)],
        "layers_per_block": count(vae, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 32,
        "sample_size": 1024 if family == "sdxl" else 512,
        "scaling_factor": 0.13025 if family == "sdxl" else 0.18215,
        "use_quant_conv": "quant_conv.weight" in vae,
        "use_post_quant_conv": "post_quant_conv.weight" in vae,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in vae,
    }


def text_config(text: Mapping[str, Tensor], openclip: bool, projected: bool = False) -> dict[str, Any]:
    """Configuration of the CLIP text encoder with these weights (transformers' names).

    Args:
        text: the weights.
        openclip: it comes from OpenCLIP (SD 2.x and SDXL's second), which uses the exact GELU, not CLIP's quick one.
        projected: its pooled output is wanted too (SDXL's second).
    """
    tokens = text["text_model.embeddings.token_embedding.weight"]
    width = tokens.shape[1]
    projection = text.get("text_projection.weight")
    layers = count(text, r"text_model\.encoder\.layers\.(\d+)\.")
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": tokens.shape[0],
        "hidden_size": width,
        "intermediate_size": text["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        # SD 2.x was trained on the last layer but one, so its last is left out, as diffusers does
        "num_hidden_layers": layers if projected or not openclip else min(layers, _SD2_TEXT_LAYERS),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": text["text_model.embeddings.position_embedding.weight"].shape[0],
        "hidden_act": "gelu" if openclip else "quick_gelu",
        "projection_dim": width if projection is None else projection.shape[0],
        "bos_token_id": tokens.shape[0] - 2,
        "eos_token_id": tokens.shape[0] - 1,
        "pad_token_id": 1,
    }


def _depths(unet: Mapping[str, Tensor], topology: UNetTopology) -> list[int]:
    """Transformer blocks per level. diffusers takes the middle block's from the last level."""
    depths = []
    for level, attention in enumerate(topology.attention):
        found = {
            count(unet, rf"{side}_blocks\.{block}\.attentions\.{i}\.transformer_blocks\.(\d+)\.")
            for side, block, extra in (("down", level, 0), ("up", len(topology.attention) - 1 - level, 1))
            for i in range(topology.layers + extra)
        }
        if attention and (len(found) != 1 or 0 in found):
            raise InputError(
                f"unknown architecture: the transformers of level {level} differ in depth ({sorted(found)}); "
                "give an SD 1.x, SD 2.x or SDXL model"
            )
        depths.append(found.pop() if attention else 1)
    middle = count(unet, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    if middle != depths[-1]:
        raise InputError(
            f"unknown architecture: {middle} transformers in the middle; give an SD 1.x, SD 2.x or SDXL model"
        )
    return depths


def _is_linear(unet: Mapping[str, Tensor]) -> bool:
    return next(v.ndim == 2 for k, v in unet.items() if k.endswith(".proj_in.weight"))


def _tiny_vae_config(vae: Mapping[str, Tensor]) -> dict[str, Any]:
    """AutoencoderTiny: each stage is a strided (or upsampled) convolution without bias and some residual blocks."""
    encoder, decoder = _stages(vae, "encoder"), _stages(vae, "decoder")
    width = vae["encoder.layers.0.weight"].shape[0]
    return {
        "_class_name": "AutoencoderTiny",
        "latent_channels": vae["decoder.layers.0.weight"].shape[1],
        "encoder_block_out_channels": [width] * len(encoder),
        "decoder_block_out_channels": [width] * len(decoder),
        "num_encoder_blocks": encoder,
        "num_decoder_blocks": decoder,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }


def _stages(vae: Mapping[str, Tensor], half: str) -> list[int]:
    stages = [0]
    for i in range(1, count(vae, rf"{half}\.layers\.(\d+)\.")):
        if f"{half}.layers.{i}.conv.0.weight" in vae:
            stages[-1] += 1
        elif f"{half}.layers.{i}.weight" in vae and f"{half}.layers.{i}.bias" not in vae:
            stages.append(0)
    return stages
