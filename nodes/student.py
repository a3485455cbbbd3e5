"""A host's U-Net for the trainer: a copy to learn on, how to call it, its data, and the LoRA that comes out."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor, nn

from lcm_core.errors import InputError
from lcm_core.files.ldm_keys import UNetTopology, rename, unet_map
from lcm_core.networks import lora_layers
from lcm_core.pipeline.image import load_image
from trainer.data.sources import read_source
from trainer.distill import Latents
from trainer.methods.shared import Network
from trainer.students import Student, choose_precision

from .model_patches import check_size

_HOST_NAMES = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "downsamplers.0.conv": "op",
    "upsamplers.0.conv": "conv",
    "time_emb_proj": "emb_layers.1",
}
TARGET_MODULES = tuple(_HOST_NAMES.get(name, name) for name in lora_layers.TARGET_MODULES)
"""The layers of an LCM-LoRA under the names that the host gives them."""

Tell = Callable[[str], None]


def copy_unet(model: Any) -> nn.Module:
    """A copy of a MODEL's U-Net with its LoRAs merged, where and as it can be trained. The MODEL itself stays as it is.

    Must be called outside of inference mode: what is copied there can be trained, the host's own weights cannot.
    """
    comfy.model_management.unload_all_models()  # the copy is what needs the room
    source = _in_memory(model)
    with torch.inference_mode():
        source.patch_model(device_to=torch.device("cpu"))
    try:
        unet = copy.deepcopy(source.model.diffusion_model)
    finally:
        with torch.inference_mode():
            source.unpatch_model(device_to=model.offload_device)
    device = comfy.model_management.get_torch_device()
    dtype = choose_precision(device, "auto", sum(weight.numel() for weight in unet.parameters()))
    unet.to(device, dtype).requires_grad_(False)
    unet.dtype = dtype  # the host's, which its forward casts to
    if (
        dtype != torch.float32
    ):  # else the last rounding is the largest error of x0; see lcm_core.networks.unet.exact_output
        unet.out.float()
        unet.out.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    return unet


def as_network(unet: Any) -> Network:
    """The host's U-Net as the trainer calls one; its conditioning is `context` (B, L, D) and, for SDXL, `y` (B, P)."""
    weight = next(unet.parameters())
    device, dtype = weight.device, weight.dtype

    def run(x: Tensor, t: Tensor, conditioning: dict[str, Any], w: Tensor | None) -> Tensor:
        given = {name: value.to(device, dtype) for name, value in conditioning.items()}
        output = unet(x.to(device, dtype), t.to(device).float(), transformer_options={}, **given)
        return output.to(x.device, x.dtype)

    return run


def name_layers(unet: nn.Module) -> dict[str, str]:
    """The LoRA name of each of a host's layers, to the one that all UIs know. Before any adapters are put in."""
    names = unet_map(UNetTopology.from_ldm(unet.state_dict()))
    paths = {path: rename(path, names) for path, _ in unet.named_modules()}
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


def read_conditioning(model: Any, conditioning: list[Any], latents: Tensor) -> dict[str, Tensor]:
    """The host's conditioning as its U-Net takes it: `context` (M, L, D) and, for SDXL, `y` (M, P).

    Raises:
        InputError: the model wants more than text, as inpainting models do.
    """
    conds = comfy.sampler_helpers.convert_cond(conditioning)
    base, cpu = model.model, torch.device("cpu")
    encoded = comfy.samplers.encode_model_conds(base.extra_conds, conds, latents, cpu, "positive")
    parts = [cond["model_conds"] for cond in encoded]
    if any("c_concat" in part for part in parts):
        raise InputError("an inpainting MODEL cannot be distilled here; use the text-to-image model that it comes from")
    taken = {"context": "c_crossattn", "y": "y"}
    return {
        name: parts[0][key].concat([part[key] for part in parts[1:]]).float().clone()
        for name, key in taken.items()
        if key in parts[0]
    }


def from_latents(model: Any, latents: Tensor, positive: list[Any], negative: list[Any]) -> Latents:
    """Training data of latents in the host's scale (N, C, h, w), and one prompt for all or one for each.

    Raises:
        InputError: prompts and latents do not pair up, or the latents are too small.
    """
    conditioning = read_conditioning(model, positive, latents)
    prompts = len(conditioning["context"])
    if prompts not in (1, len(latents)):
        raise InputError(
            f"{prompts} prompts and {len(latents)} latents do not pair up; connect one prompt, or one for each latent"
        )
    rows = {name: value.expand(len(latents), *value.shape[1:]).clone() for name, value in conditioning.items()}
    null = {name: value[:1] for name, value in read_conditioning(model, negative, latents).items()}
    length = math.lcm(rows["context"].shape[1], null["context"].shape[1])
    for given in (rows, null):  # long prompts come in several parts; repeating them changes nothing in attention
        given["context"] = given["context"].repeat(1, length // given["context"].shape[1], 1)
    check_size(model, latents)
    return Latents(model.model.process_latent_in(latents).float().clone(), rows, null)


def from_folder(model: Any, clip: Any, vae: Any, folder: Path, side: int, tell: Tell) -> Latents:
    """Training data of a folder of pictures with captions, cut to squares of `side` pixels; see `trainer.data.sources`.

    Raises:
        InputError: no pictures there.
    """
    found, latents = [], []
    items = read_source(folder).items
    for number, item in enumerate(items, 1):
        comfy.model_management.throw_exception_if_processing_interrupted()
        tell(f"encoding picture {number} of {len(items)}")
        try:
            picture = load_image(item.open(), (side, side))  # (1, 3, H, W) in [-1, 1]
        except InputError as error:
            tell(f"skipped {error}")
            continue
        latents.append(vae.encode((picture.movedim(1, -1) + 1) / 2).cpu())
        found.append(item.caption)
    if not latents:
        raise InputError(f"none of the {len(items)} pictures in {folder} could be read; convert them to .png")
    return from_latents(model, torch.cat(latents), encode_prompts(clip, found), encode_prompts(clip, [""]))


def encode_prompts(clip: Any, prompts: Iterable[str]) -> list[Any]:
    """The host's conditioning of several prompts, one entry for each; a prompt that comes again is encoded once."""
    prompts = list(prompts)
    known = {prompt: clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in dict.fromkeys(prompts)}
    return [entry for prompt in prompts for entry in known[prompt]]


def _in_memory(model: Any) -> Any:
    """A clone whose weights lie in memory; newer hosts may leave them on the disk until they are used."""
    is_dynamic = getattr(model, "is_dynamic", None)
    return model.clone(disable_dynamic=True) if is_dynamic is not None and is_dynamic() else model.clone()


def _flat(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"
