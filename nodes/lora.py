"""LCM LoRA Convert / Save: a LoRA in any layout onto a MODEL, and into a file that every UI reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.lora import Lora, read_lora, save_lora
from lcm_core.files.lora_keys import name_architecture, parse_key
from lcm_core.files.recommended import Recommended, read_recommended
from lcm_core.files.safetensors import read_metadata
from lcm_core.pipeline.sources import MODELS

from .attachments import attach_recommended, is_for_few_steps
from .host import say, schema
from .model_patches import is_unet

_MARK = "lcm_suite.saved_by"
"""Metadata of our own files; others are never overwritten."""
_SHIPPED = {"emoji LCM-LoRA (shipped with LCM Suite)": MODELS / "emoji" / "lora" / "lcm_lora.safetensors"}
_UNET = ("down_blocks_", "mid_block_", "up_blocks_", "input_blocks_", "middle_block_", "output_blocks_")
"""What the layers of Stable Diffusion's U-Nets begin with."""
_FORBIDDEN = frozenset('/\\:*?"<>|')  # folders and drives on any system, and what Windows has no names with
_LONGEST = 200  # bytes: file systems take 255, and a file that is being written has a longer name


class LCMLoraConvert(io.ComfyNode):
    """Read, check, apply and rewrite a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="LCMLoraConvert",
            display_name="LCM LoRA Convert / Save",
            aliases=["LoraLoader", "peft", "diffusers lora", "kohya", "lora converter"],
            description="Loads a LoRA in any layout, of Stable Diffusion or a flow model, tells you when it does not "
            "fit the model, and can save it as every UI, or for flow models ComfyUI, reads it.",
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=[*folder_paths.get_filename_list("loras"), *_SHIPPED],
                    tooltip="A file in models/loras, or a shipped one.",
                ),
                io.Float.Input(
                    "strength_model", default=1.0, min=-10.0, max=10.0, step=0.01, tooltip="1 is as trained, 0 is off."
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="As above, for the text encoder.",
                ),
                io.String.Input(
                    "save_as",
                    default="",
                    tooltip="A name, to save it in models/loras in kohya's layout. Empty: nothing is saved.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="The model to apply it to; it also checks that it fits."
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder to apply it to."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder with the LoRA."),
                io.String.Output(display_name="lora_name", tooltip="The file, as other LoRA nodes list it."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        lora_name: str,
        strength_model: float = 1.0,
        strength_clip: float = 1.0,
        save_as: str = "",
        model: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        """Read it once; every use is of the same tensors."""
        path = str(_SHIPPED.get(lora_name) or folder_paths.get_full_path_or_raise("loras", lora_name))
        lora, recommended = read_lora(path), _read_recommended(path)
        layers = {part: len(found) for part, found in lora.layers.items()}
        info = ", ".join(f"{count} layers of {part.replace('_', ' ')}" for part, count in layers.items())
        names: dict[str, str] = {}
        if model is not None:
            names, missing = match_layers(lora, model)
            if missing:
                info += f"; {len(missing)} of them are not in this model and are left out (first: '{missing[0]}')"
        elif save_as.strip():
            _check_unet(lora)
        state = to_host(lora, names)
        if model is not None or clip is not None:
            model, clip = comfy.sd.load_lora_for_models(model, clip, state, strength_model, strength_clip)
        if model is not None and strength_model:
            if recommended.is_distilled and is_for_few_steps(model):
                info += "; this MODEL is made for few steps already, and a second time overdoes it"
            attach_recommended(model, recommended)
        if save_as.strip():
            save_lora_file(target := lora_file(save_as), state, recommended)
            lora_name = target.name
            info += f"; saved as {lora_name}"
        say(cls, info)
        return io.NodeOutput(model, clip, lora_name)


def match_layers(lora: Lora, model: Any) -> tuple[dict[str, str], list[str]]:
    """What the host's loader calls a LoRA's layers in this model, by their flat names; and the layers that the model
    does not have, which the host leaves out, with no more than a line in its log.

    Raises:
        InputError: the LoRA is for another kind of model: none of its layers is in this one, or one has another shape.
    """
    import comfy.lora  # not a part of every host-like runtime

    weights, layers = model.model.state_dict(), lora.layers.get("unet", {})
    known: dict[str, tuple[str, Any]] = {}
    for name, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        known.setdefault(parse_key(f"{name}.alpha").path.replace(".", "_"), (name, target))
    missing = [flat for flat in layers if flat not in known]
    if missing and len(missing) == len(layers):
        raise InputError(
            f"{lora.name} is for another kind of model{_kind_of(missing)}: none of its {len(layers)} layers is in this "
            f"one (first: '{missing[0]}'); use a LoRA made for this kind of model"
        )
    names = {}
    for flat, layer in layers.items():
        if flat not in known:
            continue
        name, target = known[flat]
        if not layer.fits(shape := _shape(weights, target)):
            raise InputError(
                f"{lora.name} is for another kind of model: its layer '{flat}' is for a weight of shape "
                f"{layer.matrix_shape()}, this model's is {shape}; use a LoRA made for this kind of model"
            )
        # of other models than Stable Diffusion the path itself, which the stock loader takes for every family
        generic = isinstance(target, str) and not is_unet(model)
        names[flat] = target.removesuffix(".weight") if generic else name
    return names, missing


def _check_unet(lora: Lora) -> None:
    """Refuse a LoRA whose layers only its model can name.

    Raises:
        InputError: it is not for a U-Net of Stable Diffusion.
    """
    flats = list(lora.layers.get("unet", {}))
    if flats and not _is_of_unet(flats):
        raise InputError(
            f"{lora.name} is not for Stable Diffusion{_kind_of(flats)}, and only its own model can name its "
            "layers; connect the model, too"
        )


def _shape(weights: Mapping[str, Tensor], target: Any) -> tuple[int, ...]:
    """The shape of a weight, or of a part of it, which the host names (weight, (dimension, start, length), ...)."""
    if isinstance(target, str):
        return tuple(weights[target].shape)
    name, (dimension, _, length), *_ = target
    shape = list(weights[name].shape)
    shape[dimension] = length
    return tuple(shape)


def _kind_of(flats: Sequence[str]) -> str:
    """The kind of model, in brackets, that has layers of these names, where it is one without a U-Net."""
    kind = None if _is_of_unet(flats) else next(filter(None, map(name_architecture, flats)), None)
    return f" ({kind})" if kind else ""


def _is_of_unet(flats: Sequence[str]) -> bool:
    return any(flat.startswith(_UNET) for flat in flats)


def to_host(lora: Lora, names: Mapping[str, str]) -> dict[str, Tensor]:
    """A LoRA as the host, and for Stable Diffusion all web UIs, read it: kohya's tensors with alpha.

    Args:
        lora: any.
        names: of layers in the model, by their flat names, where these are not kohya's `lora_unet_*`.
    """
    first_encoder = "lora_te1_" if "text_encoder_2" in lora.layers else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": first_encoder, "text_encoder_2": "lora_te2_"}
    state: dict[str, Tensor] = {}
    for part, layers in lora.layers.items():
        for flat, layer in layers.items():
            name = names.get(flat) if part == "unet" else None
            known = name or f"{prefixes[part]}{flat}"
            state |= {f"{known}.{role}": tensor for role, tensor in layer.to_kohya().items()}
    return state


def lora_file(name: str, what: str = "save_as") -> Path:
    """Where a LoRA of this name belongs in the host: always a file right in its first LoRA folder.

    Args:
        name: what the user typed.
        what: the input that it was typed into.

    Raises:
        InputError: no plain name, or the file exists and is somebody else's.
    """
    stem = name.strip().removesuffix(".safetensors").strip()
    if not stem:
        raise InputError(f"{what} '{name}' names no file; give a name such as my_lcm_lora")
    if stem.startswith(".") or any(letter in _FORBIDDEN or not letter.isprintable() for letter in stem):
        raise InputError(f"{what} '{name[:80]}' is no plain file name; use letters, digits, spaces, - and _")
    if len(stem.encode()) > _LONGEST:
        raise InputError(f"{what} '{name[:40]}...' is too long for a file name; use at most {_LONGEST} letters")
    file = Path(folder_paths.get_folder_paths("loras")[0]) / f"{stem}.safetensors"
    if file.exists() and _MARK not in read_metadata(file):
        raise InputError(f"{file.name} exists in models/loras and was not saved by LCM Suite; choose another name")
    return file


def save_lora_file(
    file: Path, state: Mapping[str, Tensor], recommended: Recommended, family: str | None = None
) -> None:
    """Write a LoRA in kohya's layout, marked as ours, with how it wants to be sampled."""
    save_lora(file, state, family, {_MARK: "LCM Suite", **recommended.metadata()})


def _read_recommended(path: str) -> Recommended:
    return read_recommended(Path(path)) if path.endswith((".safetensors", ".sft")) else Recommended()
