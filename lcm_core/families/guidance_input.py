"""A guidance input for networks whose classes in diffusers have none: w as a part of every embedding of the timestep.

`UNet2DConditionModel` has it by itself (`time_cond_proj_dim`). Others embed their timesteps with the same
`TimestepEmbedding`, which adds `cond_proj(condition)` to what goes in, but are never given a condition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

EMBEDDINGS = ("time_embedding", "timestep_embedder")
"""What diffusers' networks call them."""


def add_guidance_input(network: Any, width: int) -> None:
    """Give a network `cond_proj` layers for a guidance embedding of this width, which `set_guidance` hands in."""
    for embedding in _embeddings(network):
        embedding.cond_proj = nn.Linear(width, embedding.linear_1.in_features, bias=False)
        embedding.guidance = None
        embedding.register_forward_pre_hook(_with_guidance, with_kwargs=True)
    network.register_to_config(time_cond_proj_dim=width)


def set_guidance(network: Any, embedding: Tensor | None) -> None:
    """What the network's next calls read, (B, width).

    It stays until the next time: gradient checkpointing runs parts of a network again in the backward pass.
    """
    for module in _embeddings(network):
        module.guidance = embedding


def guidance_weights(tensors: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """Weights of guidance inputs that change nothing yet, for a network without any."""
    ends = tuple(f"{name}.linear_1.weight" for name in EMBEDDINGS)
    return {
        key.replace("linear_1", "cond_proj"): tensor.new_zeros(tensor.shape[1], width)
        for key, tensor in tensors.items()
        if key.endswith(ends)
    }


def _embeddings(network: nn.Module) -> Iterator[Any]:
    return (module for name, module in network.named_modules() if name.rpartition(".")[2] in EMBEDDINGS)


def _with_guidance(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs if module.guidance is None else {**kwargs, "condition": module.guidance}
