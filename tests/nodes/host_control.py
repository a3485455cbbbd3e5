"""What host_run.py tries with LCM Adapter Loader: T2I-Adapters of several widths, and what is none."""

from __future__ import annotations

from typing import Any
from unittest import mock

import comfy.controlnet
import torch
from host_trials import apart, message_of
from safetensors.torch import load_file

UNFIT = ("cut", "other", "gone")


def try_control(suite: Any) -> dict[str, Any]:
    """How far each adapter's features, which the host gives its U-Net, are from diffusers'; and what loaded it."""
    tensors = load_file(suite.folder / "control.safetensors")
    found: dict[str, Any] = {}
    for name in ("emoji", "odd", "usual"):
        loader = comfy.controlnet.load_controlnet
        with mock.patch.object(comfy.controlnet, "load_controlnet", wraps=loader) as stock:
            control = suite.run("LCMAdapterLoader", control_net_name=f"{name}.safetensors")[0]
        found[name] = {"apart": features_apart(tensors, name, control), "by the host": stock.called}
    found["said"] = {
        name: message_of(suite.run, "LCMAdapterLoader", control_net_name=f"{name}.safetensors") for name in UNFIT
    }
    return found


def features_apart(tensors: dict[str, torch.Tensor], name: str, control: Any) -> list[float]:
    """Of each width, from the finest: the largest difference."""
    outlines = tensors["outlines"]
    control.set_cond_hint(outlines.expand(-1, 3, -1, -1))
    latents = torch.zeros(1, 4, *(side // 8 for side in outlines.shape[-2:]))
    given = control.get_control(latents, torch.tensor([999.0]), {}, 1, {})["input"]
    features = [feature for feature in given if feature is not None][::-1]
    wanted = [tensors[f"{name} features {number}"] for number in range(4)]
    return [apart(ours, theirs) for ours, theirs in zip(features, wanted, strict=True)]
