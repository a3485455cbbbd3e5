"""LCM Adapter Loader: T2I-Adapters (arXiv 2302.08453) of any widths; all else as the host loads it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import comfy.controlnet
import folder_paths
import torch
from comfy_api.latest import io

from lcm_core.errors import InputError
from lcm_core.files.safetensors import check_file, read_safetensors

from .host import say, schema

_FOLDER = "controlnet"
_BLOCKS = 2  # of each width
_STOCK = (1, 2, 4, 4)  # of the first width: Stable Diffusion's, and all that the host's own loader builds
_RATIO, _UPSCALE = 8, "nearest-exact"  # pixels of a picture along one of a latent; how the host scales outlines
_UNSHUFFLED = 64  # channels that 8 x 8 pixels of one become
_XL_CHANNELS = (256, 768)  # of a picture in squares of 16 x 16 pixels, which is how the host tells SDXL's by
_PART = re.compile(r"^adapter\.(?:body\.(\d+)\.(?:resnets\.(\d+)\.)?)?")
Shapes = Mapping[str, tuple[int, ...]]


class LCMAdapterLoader(io.ComfyNode):
    """CONTROL_NET from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return schema(
            node_id="LCMAdapterLoader",
            display_name="LCM Adapter Loader",
            aliases=["ControlNetLoader", "T2I-Adapter", "controlnet", "load controlnet"],
            description="Loads a ControlNet or T2I-Adapter. Unlike the stock loader it takes T2I-Adapters for U-Nets "
            "of other widths than Stable Diffusion's, such as the embedded model's.",
            inputs=[
                io.Combo.Input(
                    "control_net_name",
                    options=folder_paths.get_filename_list(_FOLDER),
                    tooltip="A file in models/controlnet, or the shipped emoji_canny.safetensors.",
                )
            ],
            outputs=[io.ControlNet.Output(display_name="CONTROL_NET", tooltip="For Apply ControlNet.")],
        )

    @classmethod
    def execute(cls, control_net_name: str) -> io.NodeOutput:
        """Build what the host's loader cannot; leave the rest to it."""
        path = folder_paths.get_full_path(_FOLDER, control_net_name)
        if path is None:
            raise InputError(f"{control_net_name} is not in models/controlnet; put it there, or choose another")
        shapes = _shapes(Path(path))
        if is_unusual(shapes):
            say(cls, f"T2I-Adapter for a U-Net of widths {', '.join(map(str, widths_of(shapes)))}")
            return io.NodeOutput(_load_adapter(Path(path)))
        control = comfy.controlnet.load_controlnet(path)
        if control is None:
            raise InputError(
                f"{control_net_name} is no ControlNet or T2I-Adapter that this ComfyUI knows; choose another"
            )
        return io.NodeOutput(control)


def host_names(names: Iterable[str]) -> dict[str, str]:
    """What the host calls the weights of a T2I-Adapter -> their names in diffusers' layout, or in the host's own.

    diffusers counts blocks within a width; the host counts through, and a width's `in_conv` is in its first block.
    """

    def rename(found: re.Match[str]) -> str:
        level, block = found.groups()
        return "" if level is None else f"body.{int(level) * _BLOCKS + int(block or 0)}."

    return {_PART.sub(rename, name, count=1): name for name in names}


def widths_of(shapes: Shapes) -> list[int]:
    """The widths of a T2I-Adapter, from its weights' shapes under the host's names; empty for any other network."""
    first = shapes.get("conv_in.weight", ())
    widths: list[int] = []
    if len(first) != 4 or not all(first) or first[1] % _UNSHUFFLED:
        return widths
    while len(shape := shapes.get(f"body.{len(widths) * _BLOCKS}.block2.weight", ())) == 4 and all(shape):
        widths.append(shape[0])
    return widths


def is_unusual(shapes: Shapes) -> bool:
    """Whether these are the shapes of a T2I-Adapter that the host's own loader cannot build."""
    widths = widths_of(shapes)
    return bool(widths) and widths != [times * widths[0] for times in _STOCK]


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes under the host's names, from the header alone; none of a file that is not .safetensors."""
    if file.suffix not in (".safetensors", ".sft"):
        return {}
    header = check_file(file)
    header.pop("__metadata__", None)
    return {ours: tuple(header[theirs]["shape"]) for ours, theirs in host_names(header).items()}


def _load_adapter(file: Path) -> Any:
    """The host's T2I-Adapter at the widths of a file's weights.

    Raises:
        InputError: a weight is missing, of another shape, or belongs to no T2I-Adapter.
    """
    from comfy.t2i_adapter.adapter import Adapter  # not a part of every host-like runtime

    tensors = read_safetensors(file)[0]
    state = {ours: tensors[theirs].float() for ours, theirs in host_names(tensors).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    channels = shapes["conv_in.weight"][1]
    with torch.device("meta"):  # what a file's shapes ask for takes no memory before they are seen to fit
        model = Adapter(
            cin=channels,
            channels=widths_of(shapes),
            nums_rb=_BLOCKS,
            ksize=shapes["body.0.block2.weight"][2],
            sk=True,
            use_conv=any(name.endswith("down_opt.op.weight") for name in shapes),
            xl=channels in _XL_CHANNELS,
        )
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name in sorted(wanted.keys() | shapes.keys()):
        if wanted.get(name) != shapes.get(name):
            raise InputError(
                f"{file.name} is no whole T2I-Adapter: its weight '{name}' is {_say(shapes.get(name))}, "
                f"expected {_say(wanted.get(name))}; download or export it again"
            )
    model.load_state_dict(state, assign=True)
    return comfy.controlnet.T2IAdapter(model, model.input_channels, _RATIO, _UPSCALE)


def _say(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else "x".join(map(str, shape))
