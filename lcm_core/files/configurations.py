"""What configurations from outside may say: types and sizes that a network, or a noise schedule, can have."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any, NoReturn

from lcm_core.diffusion.flow_map import END_KEY
from lcm_core.errors import InputError

PathLike = str | os.PathLike[str]
_WIDEST, _DEEPEST, _MOST_WORDS = 65_536, 128, 2**24
_LARGEST_SEEN, _MOST_PATCHES = 4096, 512  # pixels of what CLIP sees; patches along a side that have a place
_NARROWEST = 4  # of a sinusoidal embedding
_WIDTHS = (
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "encoder_block_out_channels"),
    *("decoder_block_out_channels", "cross_attention_dim", "time_cond_proj_dim", "sample_size", "norm_num_groups"),
    *("attention_head_dim", "num_attention_heads", "addition_time_embed_dim", "hidden_size", "intermediate_size"),
    *("projection_class_embeddings_input_dim", "projection_dim", "max_position_embeddings"),
    *("channels", "conditioning_channels", "conditioning_embedding_out_channels", "downscale_factor"),
    *("patch_size", "num_channels", "z_dim", "scale_factor_spatial"),
)
_DEPTHS = (
    *("layers_per_block", "transformer_layers_per_block", "num_encoder_blocks", "num_decoder_blocks"),
    *("num_hidden_layers", "num_res_blocks", "num_layers", "num_single_layers", "n_layers", "n_refiner_layers"),
)
_RANGES = {
    **dict.fromkeys(_WIDTHS, (1, _WIDEST)),
    **dict.fromkeys(_DEPTHS, (0, _DEEPEST)),
    "vocab_size": (1, _MOST_WORDS),
    "image_size": (1, _LARGEST_SEEN),
    "pos_embed_max_size": (1, _MOST_PATCHES),
    END_KEY: (_NARROWEST, _WIDEST),
    **dict.fromkeys(("num_class_embeds", "num_embeds_ada_norm"), (1, _MOST_WORDS)),
}
"""Whole numbers of a network: the least and the greatest that make sense."""
_PER_LEVEL = (
    *("block_out_channels", "encoder_block_out_channels", "decoder_block_out_channels", "sample_size"),
    *("attention_head_dim", "num_attention_heads", "layers_per_block"),
    *("transformer_layers_per_block", "num_encoder_blocks", "num_decoder_blocks"),
    *("channels", "conditioning_embedding_out_channels", "patch_size"),
)
"""The numbers that may be lists, with a number for each level of the network."""
_LISTS = (
    *("block_out_channels", "down_block_types", "up_block_types", "encoder_block_out_channels", "temperal_downsample"),
)
_STATISTICS = {"latents_mean": -math.inf, "latents_std": 0.0}
_POSITIVE = ("scaling_factor", "norm_eps", "layer_norm_eps")
_CHOICES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("class_embed_type", "encoder_hid_dim_type"), (None,)),
    "addition_embed_type": (None, "text_time"),
    "freq_shift": (0, 1),
    "upsampling_scaling_factor": (2,),
    "upsample_fn": ("nearest", "nearest-exact", "area", "bilinear", "bicubic"),
    "downsample_padding": (0, 1),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
}
"""A U-Net that differs here takes other input than Stable Diffusion's kind."""
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_MOST_TIMESTEPS = 100_000


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse a configuration with a value of a type or size that no network has; what is left out has a default.

    Raises:
        InputError: names the source, the key and what it may be.
    """
    for key, (least, most) in _RANGES.items():
        for value in _flat(config.get(key)) if key in _PER_LEVEL else _given(config, key):
            if type(value) is not int or not least <= value <= most:
                _refuse(source, key, config[key], f"use whole numbers from {least} to {most}")
    if (end := config.get(END_KEY)) is not None and end > (config.get("time_cond_proj_dim") or 0) - _NARROWEST:
        _refuse(source, END_KEY, end, f"use at least {_NARROWEST} less than time_cond_proj_dim, of which it is a part")
    for key in _LISTS:
        value = config.get(key)
        if value is not None and not (isinstance(value, (list, tuple)) and 1 <= len(value) <= _DEEPEST):
            _refuse(source, key, value, "use a list with an entry for each level")
    for key in _POSITIVE:
        if config.get(key) is not None and not _is_number(config[key], above=0):
            _refuse(source, key, config[key], "use a number above 0")
    for key, above in _STATISTICS.items():
        if (value := config.get(key)) is not None and not (
            isinstance(value, list)
            and all(_is_number(number, above) for number in value)
            and len(value) == config.get("z_dim", len(value))
        ):
            _refuse(source, key, value, "use a list with a number for each channel")
    kinds = config.get("architectures")
    if kinds is not None and not (isinstance(kinds, list) and kinds and all(isinstance(kind, str) for kind in kinds)):
        _refuse(source, "architectures", kinds, "use a list with the name of a class")
    if not isinstance(config.get("_class_name", ""), str):
        _refuse(source, "_class_name", config["_class_name"], "use the name of a class")
    for key, choices in _CHOICES.items():
        if config.get(key, choices[0]) not in choices:
            _refuse(source, key, config[key], f"use {' or '.join(map(json.dumps, choices))}")
    if config.get("shift_factor") is not None and not _is_number(config["shift_factor"]):
        _refuse(source, "shift_factor", config["shift_factor"], "use a number")


def check_scheduler(config: Mapping[str, Any], source: PathLike) -> None:
    """The same for what a scheduler's configuration says about the noise.

    Args:
        config: values that are not None, by the names of `ModelInfo`.
        source: where they came from, for the message.

    Raises:
        InputError: names the source, the key and what it may be.
    """
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        _refuse(source, "prediction_type", prediction, f"use one of {', '.join(_PREDICTIONS)}")
    if not isinstance(config.get("beta_schedule", ""), str):
        _refuse(source, "beta_schedule", config["beta_schedule"], "use the name of a schedule")
    if not isinstance(config.get("zero_terminal_snr", False), bool):
        _refuse(source, "rescale_betas_zero_snr", config["zero_terminal_snr"], "use true or false")
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 2 <= steps <= _MOST_TIMESTEPS:
        _refuse(source, "num_train_timesteps", steps, f"use a whole number from 2 to {_MOST_TIMESTEPS}")
    start, end = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
    if not (_is_number(start, above=0) and _is_number(end, above=0) and start <= end < 1):
        _refuse(source, "beta_start, beta_end", (start, end), "use 0 < beta_start <= beta_end < 1")
    betas = config.get("trained_betas", [0.1, 0.1])
    good = isinstance(betas, (list, tuple)) and 2 <= len(betas) <= _MOST_TIMESTEPS
    if not good or not all(_is_number(beta, above=0) and beta <= 1 for beta in betas):
        _refuse(source, "trained_betas", str(betas)[:60], "use a list of two or more numbers in (0, 1]")


def _given(config: Mapping[str, Any], key: str) -> list[Any]:
    return [] if config.get(key) is None else [config[key]]


def _flat(value: Any) -> list[Any]:
    """The numbers of a value that may be one, a list (of lists), or left out."""
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in (item if isinstance(item, (list, tuple)) else [item])]
    return [] if value is None else [value]


def _is_number(value: object, above: float = -math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and above < value < math.inf


def _refuse(source: PathLike, key: str, value: object, remedy: str) -> NoReturn:
    raise InputError(f"{source}: the configuration says {key} = {value!r:.60}; {remedy}, or get the model again")
