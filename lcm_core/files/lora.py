"""LoRA files in kohya's, diffusers' and peft's layouts: reading, merging into a network, and taking them out exactly.

`W' = W + sum_i strength_i * alpha_i / rank_i * up_i @ down_i` (arXiv 2106.09685 Sec. 4.1). An LCM-LoRA and a style
LoRA go in together with their strengths (arXiv 2311.05556: `t' = l1 * t_style + l2 * t_lcm`). For making and
training new ones: `lcm_core.networks.lora_layers`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcm_core.errors import InputError
from lcm_core.files import lora_keys
from lcm_core.files import safetensors as weights
from lcm_core.files.lora_keys import Part
from lcm_core.networks.lora_layers import LoraAdapters, LoraModule, add_lora, lora_state_dict, remove_lora

__all__ = [
    "Lora",
    "LoraAdapters",
    "LoraLayer",
    "LoraModule",
    "add_lora",
    "lora_state_dict",
    "merge",
    "read_lora",
    "remove_lora",
    "save_lora",
    "unmerge",
]
_ORIGINALS = "_weights_before_lora"
_PEFT_CONFIG = "adapter_config.json"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_DIFFUSERS_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA adds to one layer: `alpha / rank * up @ down`."""

    down: Tensor  # (rank, in) or (rank, in, kh, kw)
    up: Tensor  # (out, rank) or (out, rank, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        """The width of the bottleneck."""
        return self.down.shape[0]

    def delta(self, shape: Sequence[int]) -> Tensor:
        """What is added to a weight of this shape, float32, on the LoRA's device."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (product * (self.alpha / self.rank)).reshape(tuple(shape))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape can take it; linear layers and 1x1 convolutions are the same."""
        inputs = self.down[0].numel()
        return len(shape) >= 2 and self.up.shape[0] == shape[0] and inputs == torch.Size(shape[1:]).numel()


@dataclass(frozen=True)
class Lora:
    """A LoRA file: layers by the network that they belong to, then by the module's flat name (`lora_keys`)."""

    name: str
    layers: dict[Part, dict[str, LoraLayer]] = field(default_factory=dict)


def read_lora(source: str | os.PathLike[str] | Mapping[str, Tensor], alpha: float | None = None) -> Lora:
    """Read a LoRA in kohya's, diffusers' or peft's layout, whichever it is.

    Args:
        source: a safetensors file; a peft folder (`adapter_config.json`, `adapter_model.safetensors`); or a state dict.
        alpha: for layouts that keep alpha outside the tensors, when it is not found beside them. Without any, alpha is
            the rank: the LoRA is used as it is.

    Raises:
        InputError: unreadable, not finite, incomplete, or another kind of adapter (DoRA, LoHa, LoKr, ...).
    """
    if isinstance(source, Mapping):
        name, tensors, settings = "the given LoRA", source, {}
    else:
        path = Path(source)
        file = path / _PEFT_WEIGHTS if path.is_dir() else path
        tensors, metadata = weights.read_safetensors(file)
        name, settings = str(path), _settings(file, metadata)
    weights.check_finite(tensors, name)
    try:
        return Lora(name, _layers(tensors, settings, alpha))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def save_lora(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    family: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write kohya-layout tensors (see `adapters.lora_state_dict`) with the metadata that the web UIs read.

    Args:
        path: the .safetensors file.
        tensors: `lora_unet_*.lora_down.weight`, `.lora_up.weight`, `.alpha`.
        family: "sd1", "sd2" or "sdxl"; the UIs then list it with the models that it fits.
        metadata: more of it.
    """
    first = next((key for key in tensors if key.endswith(".lora_down.weight")), None)
    if first is None:
        raise InputError(f"cannot write {path}: there is no LoRA layer to write; train one first")
    stated = {"ss_network_module": "networks.lora", "ss_network_dim": str(tensors[first].shape[0])}
    stated["ss_network_alpha"] = str(float(tensors[first.replace(".lora_down.weight", ".alpha")]))
    if family:
        base = {"sd1": ("sd_v1", "stable-diffusion-v1"), "sd2": ("sd_v2", "stable-diffusion-v2")}
        version, architecture = base.get(family, ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"))
        stated |= {"ss_base_model_version": version, "modelspec.architecture": f"{architecture}/lora"}
    weights.write_safetensors(path, tensors, {**stated, **(metadata or {})})


def merge(
    model: nn.Module, loras: Sequence[tuple[Lora, float]], part: Part = "unet", keep_originals: bool = True
) -> None:
    """Merge LoRAs, all together and each with its strength, into a network's weights, in place of any merged before.

    The weights that change are kept so that `unmerge` can put them back bit for bit. On a CPU the originals themselves
    are kept and only the merged ones are new memory; from another device they are copied to the CPU.

    Args:
        model: a diffusers U-Net or a transformers text encoder.
        loras: from `read_lora`, with strengths; 1 is as trained.
        part: which layers of the LoRAs to use.
        keep_originals: False saves their memory where nothing will be unmerged.

    Raises:
        InputError: a LoRA is for another architecture. Nothing has been merged then.
    """
    unmerge(model)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    names = lora_keys.flat_names(modules, part)
    for lora, _ in loras:
        _check_fit(lora, lora.layers.get(part, {}), names, modules)
    changed = {names[flat] for lora, _ in loras for flat in lora.layers.get(part, {})} if keep_originals else set()
    # .cpu() hands out the very tensor where it is on the CPU already; the merged weight below is new memory.
    setattr(model, _ORIGINALS, {path: modules[path].weight.data.cpu() for path in changed})
    with torch.no_grad():
        for path, total in _deltas(loras, part, names, modules):
            weight = modules[path].weight
            # empty_like keeps the memory format, a plain sum may not
            weight.data = torch.empty_like(weight.data).copy_(weight.data.float() + total.to(weight.device))


def unmerge(model: nn.Module) -> None:
    """Put a network's weights back, bit for bit as they were before `merge`; nothing to do when nothing is merged."""
    for path, original in getattr(model, _ORIGINALS, {}).items():
        weight = model.get_submodule(path).weight
        weight.data = original.to(weight.device)
    setattr(model, _ORIGINALS, {})


def _deltas(
    loras: Sequence[tuple[Lora, float]], part: Part, names: Mapping[str, str], modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Tensor]]:
    """For each module, one at a time, the sum of what all LoRAs add to its weight."""
    wanted: dict[str, list[tuple[LoraLayer, float]]] = {}
    for lora, strength in loras:
        for flat, layer in lora.layers.get(part, {}).items():
            wanted.setdefault(names[flat], []).append((layer, strength))
    for path, layers in wanted.items():
        shape = _shape(modules[path])
        yield path, torch.stack([strength * layer.delta(shape) for layer, strength in layers]).sum(0)


def _check_fit(
    lora: Lora, layers: Mapping[str, LoraLayer], names: Mapping[str, str], modules: Mapping[str, nn.Module]
) -> None:
    for flat, layer in layers.items():
        if flat in names and not layer.fits(shape := _shape(modules[names[flat]])):
            raise InputError(
                f"{lora.name} is for another architecture: its module '{flat}' is for a weight of shape "
                f"{_shape_of(layer)}, this model's is {shape}; use a LoRA made for this kind of model"
            )
    missing = [flat for flat in layers if flat not in names]
    if missing:
        raise InputError(
            f"{lora.name} is for another architecture: {len(missing)} of its {len(layers)} modules are not in this "
            f"model (first: '{missing[0]}', {_shape_of(layers[missing[0]])}); use a LoRA made for this kind of model"
        )


def _shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.weight.shape)  # type: ignore[arg-type]


def _shape_of(layer: LoraLayer) -> tuple[int, ...]:
    return layer.up.shape[0], *layer.down.shape[1:]


def _layers(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], alpha: float | None
) -> dict[Part, dict[str, LoraLayer]]:
    halves: dict[tuple[Part, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        address = lora_keys.parse_key(key)
        halves.setdefault((address.part, address.path), {})[address.role] = tensor
    layers: dict[Part, dict[str, LoraLayer]] = {}
    for (part, path), found in halves.items():
        if "down" not in found or "up" not in found:
            raise InputError(f"its module '{path}' has only {', '.join(found)}; get the file again")
        down, up = found["down"], found["up"]
        if down.ndim < 2 or up.ndim < 2 or up.shape[1] != down.shape[0] or up[0, 0].numel() != 1:
            raise InputError(
                f"its module '{path}' has halves {tuple(down.shape)} and {tuple(up.shape)} that do not join"
            )
        rank = down.shape[0]
        stated = float(found["alpha"]) if "alpha" in found else _stated_alpha(settings.get(part, settings), path, rank)
        value = stated if stated is not None else rank if alpha is None else alpha
        layers.setdefault(part, {})[path.replace(".", "_")] = LoraLayer(down, up, float(value))
    if not layers:
        raise InputError("it holds no tensors; give a LoRA file")
    return layers


def _stated_alpha(settings: Mapping[str, Any], path: str, rank: int) -> float | None:
    """Alpha by peft's configuration, which has patterns for modules; a rank-stabilised scale is alpha / sqrt(rank)."""
    value = settings.get("lora_alpha")
    for pattern, other in (settings.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            value = other
    if value is None:
        return None
    return value * rank**0.5 if settings.get("use_rslora") else value


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's configuration, from the file beside the weights or from the metadata in which diffusers writes it."""
    config = file.with_name(_PEFT_CONFIG)
    if file.name == _PEFT_WEIGHTS and config.is_file():
        return weights.read_json(config)
    packed: dict[str, Any] = json.loads(metadata.get(_DIFFUSERS_METADATA, "{}"))
    settings: dict[str, Any] = {}
    for key, value in packed.items():
        part, _, name = key.partition(".")
        if name:
            settings.setdefault(part, {})[name] = value
        else:
            settings[key] = value
    return settings
