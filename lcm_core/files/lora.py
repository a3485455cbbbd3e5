"""LoRA files of every usual layout and kind: reading, merging into a network, and taking them out exactly.

`W' = W + sum_i strength_i * change_i(W)`, where the change of a plain LoRA is `alpha_i / rank_i * up_i @ down_i` (arXiv
2106.09685 Sec. 4.1) and `lora_formulas` has the other kinds. An LCM-LoRA and a style LoRA go in together with their
strengths (arXiv 2311.05556: `t' = l1 * t_style + l2 * t_lcm`), in any order. A DoRA's strength is a straight line from
W to its weight, as in ComfyUI and the web UIs. For making and training new ones: `lcm_core.networks.lora_layers`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcm_core.errors import InputError
from lcm_core.files import lora_keys
from lcm_core.files import safetensors as weights
from lcm_core.files.lora_keys import Part
from lcm_core.files.lora_tensors import Layers, LoraLayer, read_layers

_ORIGINALS = "_weights_before_lora"
_PEFT_CONFIG = "adapter_config.json"
_PEFT_WEIGHTS = "adapter_model.safetensors"
_DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_NOT_LORA = "bundle_emb."  # embeddings that OneTrainer puts beside the LoRA
_LEFT_OUT_AT_MOST = 0.1
"""Share of a LoRA's modules that a model may lack; with more of them missing it was made for another architecture."""
_MOST_STRENGTH = 100.0
_LISTED = 8  # names in one message
_DIFFUSERS_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class Lora:
    """A LoRA file: layers by the network that they belong to, then by the module's flat name (`lora_keys`)."""

    name: str
    layers: Layers = field(default_factory=dict)


def read_lora(source: str | os.PathLike[str] | Mapping[str, Tensor], alpha: float | None = None) -> Lora:
    """Read a LoRA, DoRA, LoHa or LoKr in any layout that `lora_keys` knows, whichever it is.

    Args:
        source: a safetensors file; a folder as peft or diffusers write it (`find_lora_file`); or a state dict.
        alpha: for layouts that keep alpha outside the tensors, when it is not found beside them. Without any, alpha is
            the rank: the LoRA is used as it is.

    Warns:
        of parts of the file that have no effect.

    Raises:
        InputError: unreadable, not finite, integers, incomplete, or another kind of adapter (OFT, GLoRA, ...).
    """
    if isinstance(source, Mapping):
        name, tensors, file = "the given LoRA", dict(source), None
    else:
        name, file = str(source), find_lora_file(source)
        tensors, metadata = weights.read_safetensors(file)
    others = [key for key in tensors if key.startswith(_NOT_LORA)]
    try:
        settings = _settings(file, metadata) if file else {}
        layers = read_layers({key: tensors[key] for key in tensors if key not in others}, settings, alpha)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if others:
        warnings.warn(f"{name}: {len(others)} tensors are no LoRA and are left out: {_listed(others)}", stacklevel=2)
    _note_zeros(name, layers)
    return Lora(name, layers)


def find_lora_file(path: str | os.PathLike[str]) -> Path:
    """The weights that a path stands for: a file itself, or the LoRA in a folder.

    Raises:
        InputError: a folder without a LoRA, or with several files of which none has a usual name.
    """
    folder = Path(path)
    if not folder.is_dir():
        return folder
    for name in (_PEFT_WEIGHTS, _DIFFUSERS_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = f"it holds {_listed([file.name for file in files])}; give one of these files" if files else ""
    raise InputError(f"{folder}: " + (found or f"no LoRA in this folder ({_DIFFUSERS_WEIGHTS}); give the LoRA's file"))


def save_lora(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    family: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write kohya-layout tensors (see `lora_state_dict`) with the metadata that the web UIs read.

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
    model: nn.Module,
    loras: Sequence[tuple[Lora, float]],
    part: Part = "unet",
    keep_originals: bool = True,
    other_names: Mapping[str, str] | None = None,
) -> None:
    """Merge LoRAs, all together and each with its strength, into a network's weights, in place of any merged before.

    The weights that change are kept so that `unmerge` can put them back bit for bit. On a CPU the originals themselves
    are kept and only the merged ones are new memory; from another device they are copied to the CPU.

    Args:
        model: a diffusers U-Net or a transformers text encoder.
        loras: from `read_lora`, with strengths; 1 is as trained.
        part: which layers of the LoRAs to use.
        keep_originals: False saves their memory where nothing will be unmerged.
        other_names: see `lora_keys.flat_names`.

    Warns:
        when a few modules of a LoRA are not in the network; they are named and left out.

    Raises:
        InputError: a LoRA is for another architecture, or its strength is out of range. Nothing has been merged then.
    """
    check_strengths(loras)
    unmerge(model)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    names = lora_keys.flat_names(modules, part, other_names)
    shapes = {path: tuple(module.weight.shape) for path, module in modules.items()}
    wanted: dict[str, list[tuple[LoraLayer, float]]] = {}
    for lora, strength in loras:
        for flat, layer in fitting(lora, part, names, shapes).items():
            wanted.setdefault(names[flat], []).append((layer, strength))
    # .cpu() hands out the very tensor where it is on the CPU already; the merged weight below is new memory.
    kept = wanted if keep_originals else ()
    setattr(model, _ORIGINALS, {path: modules[path].weight.data.cpu() for path in kept})
    with torch.no_grad():
        for path, layers in wanted.items():
            weight = modules[path].weight
            total = torch.stack([strength * layer.change(weight.data) for layer, strength in layers]).sum(0)
            # empty_like keeps the memory format, a plain sum may not
            weight.data = torch.empty_like(weight.data).copy_(weight.data.float() + total.to(weight.device))


def unmerge(model: nn.Module) -> None:
    """Put a network's weights back, bit for bit as they were before `merge`; nothing to do when nothing is merged."""
    for path, original in getattr(model, _ORIGINALS, {}).items():
        weight = model.get_submodule(path).weight
        weight.data = original.to(weight.device)
    setattr(model, _ORIGINALS, {})


def check_strengths(loras: Iterable[tuple[Lora, float]]) -> None:
    """Refuse strengths that no weight survives.

    Raises:
        InputError: names the LoRA.
    """
    for lora, strength in loras:
        if not abs(strength) <= _MOST_STRENGTH:
            raise InputError(f"{lora.name}: strength {strength:g} is out of range; 0 is off, 1 is as trained")


def check_parts(lora: Lora, parts: Iterable[Part]) -> None:
    """Say which of a LoRA's networks a model does not have, before the LoRA is merged into those that it has.

    Raises:
        InputError: it has none of them.
    """
    missing = [part for part in lora.layers if part not in set(parts)]
    text = " and ".join(f"{len(lora.layers[part])} modules of {part}" for part in missing)
    if missing and len(missing) == len(lora.layers):
        raise InputError(
            f"{lora.name} is for another architecture: it has {text}, which this model does not have; "
            "use a LoRA made for this kind of model"
        )
    if missing:
        warnings.warn(f"{lora.name}: {text} are left out, because this model does not have it", stacklevel=2)


def fitting(
    lora: Lora, part: Part, names: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, LoraLayer]:
    """The layers of a LoRA that a network has modules for.

    Args:
        lora: the file.
        part: which of its networks.
        names: flat name -> path in the network.
        shapes: path -> shape of the weight.

    Warns:
        when a few are not in the network; they are named and left out.

    Raises:
        InputError: it is for another architecture.
    """
    layers = lora.layers.get(part, {})
    for flat, layer in layers.items():
        if flat in names and not layer.fits(shape := tuple(shapes[names[flat]])):
            raise InputError(
                f"{lora.name} is for another architecture: its module '{flat}' is for a weight of shape "
                f"{_shape_of(layer)}, this model's is {shape}; use a LoRA made for this kind of model"
            )
    missing = [flat for flat in layers if flat not in names]
    if len(missing) > _LEFT_OUT_AT_MOST * len(layers):
        kind = next(filter(None, map(lora_keys.name_architecture, missing)), None)
        raise InputError(
            f"{lora.name} is for another architecture{f' ({kind})' if kind else ''}: {len(missing)} of its "
            f"{len(layers)} modules are not in this model (first: '{missing[0]}', {_shape_of(layers[missing[0]])}); "
            "use a LoRA made for this kind of model"
        )
    if missing:
        warnings.warn(
            f"{lora.name}: {len(missing)} of its {len(layers)} modules for the {part} are not in this model and are "
            f"left out: {_listed(missing)}",
            stacklevel=3,
        )
    return {flat: layer for flat, layer in layers.items() if flat in names}


def _shape_of(layer: LoraLayer) -> tuple[int, ...]:
    plain = layer.kind == "LoRA" and "mid" not in layer.factors
    return (layer.up.shape[0], *layer.down.shape[1:]) if plain else layer.matrix_shape()


def _note_zeros(name: str, layers: Layers) -> None:
    """Say which modules have no effect."""
    every = [(flat, layer) for found in layers.values() for flat, layer in found.items()]
    zeros = [flat for flat, layer in every if layer.alpha == 0]
    if zeros:
        warnings.warn(
            f"{name}: alpha is 0 in {len(zeros)} of {len(every)} modules, so that these add nothing: {_listed(zeros)}",
            stacklevel=3,
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _settings(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's configuration, from the file beside the weights or from the metadata in which diffusers writes it."""
    config = file.with_name(_PEFT_CONFIG)
    if file.name == _PEFT_WEIGHTS and config.is_file():
        return weights.read_json(config)
    try:
        packed = json.loads(metadata.get(_DIFFUSERS_METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"its metadata {_DIFFUSERS_METADATA} is no JSON ({error}); correct or remove it") from error
    if not isinstance(packed, dict):
        raise InputError(f"its metadata {_DIFFUSERS_METADATA} holds no JSON object; correct or remove it")
    settings: dict[str, Any] = {}
    for key, value in packed.items():
        part, dot, name = key.partition(".")
        if dot:
            group = settings.setdefault(part, {})
            if isinstance(group, dict):
                group[name] = value
        else:
            settings[key] = value
    return settings
