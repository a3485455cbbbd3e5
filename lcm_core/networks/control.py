"""Pictures that guide what a U-Net paints: T2I-Adapters (arXiv 2302.08453) and ControlNets (arXiv 2302.05543).

IP-Adapters are in `ip_adapter.py`; `load_control` here tells all three apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.diffusion.flow_map import END_KEY
from lcm_core.errors import InputError
from lcm_core.files.checkpoint import Component
from lcm_core.files.configurations import check_config
from lcm_core.files.safetensors import PathLike, read_folder, read_json, read_safetensors
from lcm_core.networks.cross_attention import check_keys
from lcm_core.networks.device import assemble
from lcm_core.networks.ip_adapter import IPAdapter, find_image_encoder, is_ip_adapter, load_ip_adapter
from lcm_core.networks.unet import UNet

Residuals = dict[str, list[Tensor]]
"""The U-Net's own name of what is added to it -> tensors (B, C, h, w)."""
Guide = Callable[[Tensor, Tensor, Mapping[str, Any]], Residuals]
"""A function from a U-Net's x, t and conditioning to what is added to it."""
_ADAPTER = "down_intrablock_additional_residuals"
_DOWN, _MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"
_TOKENS = 77  # of a text
_UNSHUFFLED = 64  # channels that a full adapter makes of one: 8 x 8 pixels


class Control:
    """A loaded T2I-Adapter or ControlNet.

    Attributes:
        channels: of its picture, 1 or 3.
    """

    def __init__(self, model: Any) -> None:
        parameter = next(model.parameters())
        self.model, self.device, self.dtype = model, parameter.device, parameter.dtype
        self.is_adapter = type(model).__name__ == "T2IAdapter"
        self.channels: int = model.config["in_channels" if self.is_adapter else "conditioning_channels"]

    def guide(self, picture: Tensor, strength: float) -> Guide:
        """What a picture (1, channels, H, W) in [0, 1] adds, times `strength`; or one for each sample (B, ...)."""
        hint = picture.to(self.device, self.dtype)
        if self.is_adapter:
            features = [feature * strength for feature in self.model(hint)]
            return lambda x, t, cond: {_ADAPTER: [feature.expand(len(x), -1, -1, -1) for feature in features]}

        def residuals(x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Residuals:
            added = cond.get("added_cond_kwargs")
            down, middle = self.model(
                x.to(self.dtype),
                t.to(self.device),
                cond["encoder_hidden_states"].to(self.dtype),
                hint.expand(len(x), -1, -1, -1),
                conditioning_scale=strength,
                added_cond_kwargs=None if added is None else {k: v.to(self.dtype) for k, v in added.items()},
                return_dict=False,
            )
            return {_DOWN: list(down), _MIDDLE: [middle]}

        return residuals


def controlled(unet: Callable[..., Tensor], guides: Sequence[Guide]) -> Callable[..., Tensor]:
    """A U-Net, as `UNet` is called, to which pictures add; with several, they add up."""

    def network(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        total: Residuals = {}
        for guide in guides:
            for name, tensors in guide(x, t, cond).items():
                before = total.get(name)
                total[name] = tensors if before is None else [a + b for a, b in zip(before, tensors, strict=True)]
        return unet(x, t, residuals=total, **cond)

    return network


@torch.no_grad()
def load_control(path: PathLike, unet: UNet, model: PathLike, scale: int = 8) -> Control | IPAdapter:
    """Load a T2I-Adapter (a file, or a diffusers folder), a ControlNet (a diffusers folder) or an IP-Adapter (a file),
    frozen.

    Args:
        unet: that it is to guide, on its device and in its number format.
        model: folder or file of the model, where an IP-Adapter's image encoder may lie.
        scale: pixels per latent pixel, along one side.

    Raises:
        InputError: it is none of these, broken, or for another U-Net.
    """
    root = Path(path)
    if root.is_file() and is_ip_adapter(tensors := read_safetensors(root)[0]):
        adapter = load_ip_adapter(tensors, root, find_image_encoder(root, Path(model)), unet.device, unet.dtype)
        check_keys(adapter.keys, unet, path)
        return adapter
    control = Control(_assemble(_read(root), unet.device, unet.dtype))
    _check_widths(control, unet, path)
    _check_call(control, unet, path, scale)
    return control


def _assemble(component: Component, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import ControlNetModel, T2IAdapter

    kinds: dict[str, Any] = {"T2IAdapter": T2IAdapter, "ControlNetModel": ControlNetModel}
    kind = component.config.get("_class_name")
    if kind not in kinds:
        raise InputError(
            f"control {component.source} is a {kind!s:.60}; give a T2I-Adapter, or a ControlNet as a diffusers folder"
        )
    config = {key: value for key, value in component.config.items() if not key.startswith("_")}
    build = kinds[str(kind)]
    return assemble(lambda: build(**config), component, device, dtype, torch.contiguous_format)


def _check_widths(control: Control, unet: UNet, path: PathLike) -> None:
    """Refuse a control for a U-Net of other widths.

    Raises:
        InputError: names both.
    """
    name = "channels" if control.is_adapter else "block_out_channels"
    theirs, ours = list(control.model.config[name]), list(unet.model.config["block_out_channels"])
    text = None if control.is_adapter else control.model.config["cross_attention_dim"]
    if theirs != ours or (text is not None and text != unet.model.config["cross_attention_dim"]):
        raise InputError(
            f"control {path} is for a U-Net of widths {theirs}, this model's are {ours}; give one made for it"
        )


def _check_call(control: Control, unet: UNet, path: PathLike, scale: int) -> None:
    """Refuse a control that this U-Net cannot call, or whose outputs it cannot add, by one call of twins of both that
    have no contents.

    Raises:
        InputError: gives the reason.
    """
    side = 2 * unet.multiple
    try:
        if control.channels not in (1, 3):
            raise ValueError(f"it reads {control.channels} channels of a picture")
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin, network = Control(_twin(control.model)), UNet(_twin(unet.model))
            guide = twin.guide(torch.empty(1, control.channels, side * scale, side * scale), 1.0)
            x, t = torch.empty(1, unet.in_channels, side, side), torch.empty(1)
            controlled(network, [guide])(x, t, **_inputs(network))
    except Exception as error:  # of each network its own
        reason = " ".join(f"{error}".split())[:200]
        raise InputError(
            f"control {path} does not go with this model's U-Net ({reason}); give one made for it"
        ) from error


def _twin(model: Any) -> Any:
    return type(model).from_config({key: value for key, value in model.config.items() if key != END_KEY})


def _inputs(unet: UNet) -> dict[str, Any]:
    """A U-Net's conditioning, without contents."""
    config = unet.model.config
    inputs: dict[str, Any] = {"encoder_hidden_states": torch.empty(1, _TOKENS, config["cross_attention_dim"])}
    if unet.guidance_embedding_dim is not None:
        inputs["timestep_cond"] = torch.empty(1, unet.guidance_embedding_dim)
    if config["addition_embed_type"] == "text_time":
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(1, width), "time_ids": torch.empty(1, 6)}
    return inputs


def _read(root: Path) -> Component:
    if root.is_dir():
        config = read_json(root / "config.json")
        check_config(config, str(root / "config.json"))
        return Component(read_folder(root), config, str(root))
    tensors, _ = read_safetensors(root)
    return Component(tensors, _adapter_config(tensors, root), str(root))


def _adapter_config(tensors: Mapping[str, Tensor], root: Path) -> dict[str, Any]:
    """A bare file's configuration, by its shapes."""
    first = tensors.get("adapter.conv_in.weight")
    last = (tensors.get(f"adapter.body.{number}.resnets.0.block2.weight") for number in range(len(tensors)))
    widths = [weight.shape[0] for weight in last if weight is not None and weight.ndim]
    if first is None or not widths or first.ndim != 4 or not first.shape[1] or first.shape[1] % _UNSHUFFLED:
        raise InputError(f"control {root} is no T2I-Adapter in diffusers' layout; give one, or a ControlNet's folder")
    blocks = sum(key.startswith("adapter.body.0.resnets.") and key.endswith(".block2.weight") for key in tensors)
    return {
        "_class_name": "T2IAdapter",
        "in_channels": first.shape[1] // _UNSHUFFLED,
        "channels": widths,
        "num_res_blocks": blocks,
    }
