"""Building transformers' CLIP networks, for text and for pictures, from files of any age."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lcm_core.files.checkpoint import Component
from lcm_core.networks.device import assemble, build_network

_PREFIXES = ("text_model.", "vision_model.")
"""What files have before a name; transformers 5 dropped them, its predecessors want them."""


def assemble_clip(build: Callable[[], Any], component: Component, device: torch.device, dtype: torch.dtype) -> Any:
    """Build one of transformers' CLIP networks with a component's weights; frozen, and in evaluation mode.

    Weights that it does not have are left out: the last layer of SD 2.x, the logit scale, buffers of older versions.

    Raises:
        InputError: as `device.assemble`.
    """
    model = build_network(build, component)
    names = model.state_dict().keys()
    tensors = component.tensors
    for prefix in _PREFIXES:
        tensors = {key if key in names else key.removeprefix(prefix): value for key, value in tensors.items()}
    used = Component({k: v for k, v in tensors.items() if k in names}, component.config, component.source)
    for part in model.modules():
        if hasattr(part, "position_ids"):
            part.position_ids = torch.arange(part.position_embedding.num_embeddings, device=device)[None]
    return assemble(lambda: model, used, device, dtype, torch.contiguous_format)
