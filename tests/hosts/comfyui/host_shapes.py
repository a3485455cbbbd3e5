"""Prints the shapes of Qwen-Image's weights, as ComfyUI's own classes have them: `PYTHON host_shapes.py CHECKOUT`."""

from __future__ import annotations

import json
import sys
from typing import Any


def build() -> dict[str, Any]:
    """Its transformer, of one block, its text encoder and its VAE, without memory for their weights."""
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # which comes before the other imports

    import comfy.ldm.qwen_image.model
    import comfy.ldm.wan.vae
    import comfy.ops
    import comfy.text_encoders.llama
    import torch

    transformer = comfy.ldm.qwen_image.model.QwenImageTransformer2DModel
    operations = comfy.ops.disable_weight_init
    with torch.device("meta"):
        return {
            "transformer": transformer(num_layers=1, device="meta", operations=operations),
            "text": comfy.text_encoders.llama.Qwen25_7BVLI({}, torch.bfloat16, "meta", operations),
            "vae": comfy.ldm.wan.vae.WanVAE(dim=96, z_dim=16, temperal_downsample=[False, True, True]),
        }


sys.path[0] = sys.argv[1]  # and not this file's folder
shapes = {
    part: {name: list(weight.shape) for name, weight in network.state_dict().items()}
    for part, network in build().items()
}
json.dump(shapes, sys.stdout)
