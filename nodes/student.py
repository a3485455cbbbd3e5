"""A host's network for the trainer: a copy to learn on, which of its layers learn, and the LoRA that comes out."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from lcm_core.files.ldm_keys import UNetTopology, rename, unet_map
from lcm_core.networks import lora_layers
from trainer.students import Student, choose_precision

from .frozen import copy_sharing_weights, freeze, layers_of, weights_of
from .model_patches import is_unet

_HOST_NAMES = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "downsamplers.0.conv": "op",
    "upsamplers.0.conv": "conv",
    "time_emb_proj": "emb_layers.1",
}
UNET_MODULES = tuple(_HOST_NAMES.get(name, name) for name in lora_layers.TARGET_MODULES)
"""The layers of an LCM-LoRA under the names that the host gives them in a U-Net of Stable Diffusion."""
_ROOM = 0.6  # of the free memory that frozen weights may take before they are left in main memory


def copy_model(model: Any) -> Any:
    """The host's model inside a MODEL, with its LoRAs merged, where and as it can be trained. The MODEL stays as it is.

    The copy has the MODEL's own weights, frozen; see `frozen`. Must be called outside of inference mode.
    """
    comfy.model_management.unload_all_models()  # the copy is what needs the room
    source = _in_memory(model)
    with torch.inference_mode():
        source.patch_model(device_to=torch.device("cpu"))
    try:
        base = copy.copy(source.model)
        base._modules = dict(base._modules)
        base.diffusion_model = copy_sharing_weights(source.model.diffusion_model)
    finally:
        with torch.inference_mode():
            source.unpatch_model(device_to=model.offload_device)
    network: Any = base.diffusion_model
    device = comfy.model_management.get_torch_device()
    weights = weights_of(network)
    dtype = choose_precision(device, "auto", sum(weight.numel() for weight in weights))
    room = _ROOM * comfy.model_management.get_free_memory(device)
    resident = device.type == "cpu" or sum(weight.nbytes for weight in weights) < room
    freeze(network, device, dtype, resident)
    network.dtype, base.manual_cast_dtype = dtype, None  # the host's words for what it casts to
    if dtype != torch.float32 and is_unet(model):
        # else the last rounding is the largest error of x0; see lcm_core.networks.unet.exact_output
        network.out.float()
        network.out.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    return base


def target_modules(model: Any, network: nn.Module) -> tuple[str, ...]:
    """Ends of the names of the layers that learn: an LCM-LoRA's in a U-Net, all in any other network."""
    return UNET_MODULES if is_unet(model) else tuple(layers_of(network))


def name_layers(model: Any, network: nn.Module) -> dict[str, str]:
    """The LoRA name of each layer, to the one in its file. Before any adapters are put in.

    Layers of a U-Net get the names that all UIs know, those of any other network the host's own, which its loader takes
    for every model: `diffusion_model.<path>`.
    """
    if not is_unet(model):
        return {_flat(path): f"diffusion_model.{path}" for path in layers_of(network)}
    names = unet_map(UNetTopology.from_ldm(model.model.diffusion_model.state_dict()))
    paths = {path: rename(path, names) for path, _ in network.named_modules()}
    return {_flat(path): _flat(new) for path, new in paths.items() if new}


def lora_of(student: Student, names: dict[str, str]) -> dict[str, Tensor]:
    """What a student has learnt, in kohya's layout, half precision."""
    state = lora_layers.lora_state_dict(student.unet, ema=student.final == "ema", dtype=torch.float16)
    return {
        names[layer] + dot + rest: value for key, value in state.items() for layer, dot, rest in [key.partition(".")]
    }


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A short hash that tells one network, or one set of data, from another: of each tensor's sum and first moment."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().double().flatten().cpu()
        place = torch.linspace(0, 1, len(flat), dtype=torch.float64)  # so that the order counts too
        digest.update(repr((tuple(tensor.shape), float(flat.sum()), float(flat @ place))).encode())
    return digest.hexdigest()[:16]


def _in_memory(model: Any) -> Any:
    """A clone whose weights lie in memory; newer hosts may leave them on the disk until they are used."""
    is_dynamic = getattr(model, "is_dynamic", None)
    return model.clone(disable_dynamic=True) if is_dynamic is not None and is_dynamic() else model.clone()


def _flat(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"
