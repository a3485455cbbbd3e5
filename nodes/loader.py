"""LCM Checkpoint Loader: any checkpoint, and full LCMs with their guidance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import AS_FLOW, read_component, save_single_file
from lcm_core.files.safetensors import check_file
from lcm_core.pipeline.sources import find_source

from .attachments import attach_guidance, attach_recommended, take_recommended
from .guidance import take_guidance
from .host import say, schema
from .model_patches import inspect_model
from .native_vae import as_taesd, own_config, take_vae

_FOLDERS = ("checkpoints", "diffusion_models")
_SHIPPED: dict[str, tuple[str, tuple[str, ...]]] = {
    "emoji (shipped with LCM Suite)": ("lcm", ()),
    "emoji teacher (shipped with LCM Suite)": ("teacher", ()),
    "emoji teacher as a flow model (shipped with LCM Suite)": ("teacher", (AS_FLOW,)),
}
"""Names in the list; which network, and marks of its file."""


class LCMCheckpointLoader(io.ComfyNode):
    """MODEL, CLIP and VAE from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="LCMCheckpointLoader",
            display_name="LCM Checkpoint Loader",
            aliases=["CheckpointLoaderSimple", "UNETLoader", "full LCM", "cond_proj"],
            description="Loads a checkpoint. Unlike the stock loader it keeps the guidance of a full LCM (cond_proj), "
            "which LCM Apply and LCM KSampler then set. Bare U-Nets load too, without CLIP and VAE.",
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=_names(),
                    tooltip="A .safetensors file in models/checkpoints or models/diffusion_models, or a shipped model.",
                )
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="For LCM KSampler, or LCM Apply and any sampler."),
                io.Clip.Output(display_name="CLIP", tooltip="The file's text encoder."),
                io.Vae.Output(display_name="VAE", tooltip="The file's VAE."),
                io.String.Output(display_name="info", tooltip="What was found in the file."),
            ],
        )

    @classmethod
    def execute(cls, ckpt_name: str) -> io.NodeOutput:
        """Load, and keep what the host has no place for."""
        model, clip, vae, _ = load_checkpoint(_find(ckpt_name))
        info = inspect_model(model).describe()
        say(cls, info)
        return io.NodeOutput(model, clip, vae, info)


class EmojiVAE(comfy.sd.VAE):
    """The embedded model's VAE at its own width.

    Args:
        state: its weights, in the ldm layout without a prefix.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__(sd=state, config=own_config())

    def get_sd(self) -> dict[str, Tensor]:
        """What the host saves: the tiny VAE, which its loaders can build."""
        return as_taesd()


def load_checkpoint(path: str, **options: Any) -> tuple[Any, ...]:
    """The host's MODEL, CLIP, VAE and CLIP vision of a file, with a full LCM's guidance attached to the MODEL.

    Args:
        path: a .safetensors file.
        options: of the host's loader.

    Raises:
        InputError: not a readable .safetensors file, or no model that the host knows.
    """
    check_file(Path(path))
    state, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    guidance = take_guidance(state, metadata or {})
    recommended = take_recommended(state, metadata or {}, Path(path).name)
    vae = take_vae(state)
    loaded = comfy.sd.load_state_dict_guess_config(
        state,
        output_vae=vae is None,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        metadata=metadata,
        **options,
    )
    if loaded is None:
        raise InputError(
            f"{Path(path).name} is no checkpoint that this ComfyUI knows; give an SD 1.x, SD 2.x or SDXL model"
        )
    model = loaded[0]
    model.cached_patcher_init = (load_checkpoint, (path,), 0)  # how newer hosts load a MODEL once more
    if guidance is not None:
        attach_guidance(model, guidance)
    attach_recommended(model, recommended)
    return loaded if vae is None else (*loaded[:2], EmojiVAE(vae), *loaded[3:])


def _names() -> list[str]:
    found = dict.fromkeys(name for folder in _FOLDERS for name in folder_paths.get_filename_list(folder))
    return [*(name for name in found if name.endswith((".safetensors", ".sft"))), *_SHIPPED]


def _find(name: str) -> str:
    if name in _SHIPPED:
        return _unpack(*_SHIPPED[name])
    for folder in _FOLDERS:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return path
    raise InputError(f"{name} is not in models/checkpoints or models/diffusion_models; put it there, or choose another")


def _unpack(unet: str, marks: Sequence[str]) -> str:
    """The shipped model as one file in the host's temporary folder, which it empties by itself."""
    source = find_source("emoji", unet)
    file = Path(folder_paths.get_temp_directory(), f"lcm_suite_emoji_{unet}{'_flow' if marks else ''}.safetensors")
    if file.exists():
        return str(file)
    places = {"unet": source.unet, "vae": source.vae, "text_encoder": source.text}
    parts = {part: read_component(place, part) for part, place in places.items()}
    save_single_file(file, parts, source.info, metadata=source.recommended.metadata(), marks=marks)
    return str(file)
