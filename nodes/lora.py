"""LCM LoRA Convert / Save: a LoRA in any layout onto a MODEL, and into a file that every UI reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.lora import Lora, read_lora, save_lora
from lcm_core.files.recommended import Recommended, read_recommended
from lcm_core.files.safetensors import read_metadata
from lcm_core.pipeline.sources import MODELS

from .attachments import attach_recommended
from .host import say, schema

_MARK = "lcm_suite.saved_by"
"""Metadata of our own files; others are never overwritten."""
_SHIPPED = {"emoji LCM-LoRA (shipped with LCM Suite)": MODELS / "emoji" / "lora" / "lcm_lora.safetensors"}
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
            description="Loads a LoRA in kohya's, diffusers' or peft's layout, tells you when it does not fit the "
            "model, and can save it in kohya's layout, which every UI reads.",
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
        if model is not None and (missing := check_fit(lora, model)):
            info += f"; {len(missing)} of them are not in this model and are left out (first: '{missing[0]}')"
        state = to_kohya(lora)
        if model is not None or clip is not None:
            model, clip = comfy.sd.load_lora_for_models(model, clip, state, strength_model, strength_clip)
        if model is not None:
            attach_recommended(model, recommended)
        if save_as.strip():
            save_lora_file(target := lora_file(save_as), state, recommended)
            lora_name = target.name
            info += f"; saved as {lora_name}"
        say(cls, info)
        return io.NodeOutput(model, clip, lora_name)


def check_fit(lora: Lora, model: Any) -> list[str]:
    """The layers of a LoRA that a model does not have; the host leaves them out, with no more than a line in its log.

    Raises:
        InputError: the LoRA is for another kind of model: none of its layers is in this one, or one has another shape.
    """
    import comfy.lora  # not a part of every host-like runtime

    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = model.model.state_dict()
    layers = lora.layers.get("unet", {})
    missing = [flat for flat in layers if f"lora_unet_{flat}" not in keys]
    if missing and len(missing) == len(layers):
        raise InputError(
            f"{lora.name} is for another kind of model: none of its {len(layers)} layers is in this one "
            f"(first: '{missing[0]}'); use a LoRA made for this kind of model"
        )
    for flat, layer in layers.items():
        name = keys.get(f"lora_unet_{flat}")
        if name is not None and not layer.fits(shape := tuple(weights[name].shape)):
            raise InputError(
                f"{lora.name} is for another kind of model: its layer '{flat}' is for a weight of shape "
                f"{layer.matrix_shape()}, this model's is {shape}; use a LoRA made for this kind of model"
            )
    return missing


def to_kohya(lora: Lora) -> dict[str, Tensor]:
    """A LoRA as `lora_unet_*` and `lora_te*_*` tensors with alpha, which the host and all web UIs read."""
    first_encoder = "lora_te1_" if "text_encoder_2" in lora.layers else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": first_encoder, "text_encoder_2": "lora_te2_"}
    state: dict[str, Tensor] = {}
    for part, layers in lora.layers.items():
        for flat, layer in layers.items():
            state |= {f"{prefixes[part]}{flat}.{name}": tensor for name, tensor in layer.to_kohya().items()}
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
