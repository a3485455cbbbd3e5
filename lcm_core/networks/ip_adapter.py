"""IP-Adapters: a picture that a U-Net attends to beside its text (arXiv 2308.06721), plain and "plus"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import Component, check_finite
from lcm_core.files.configurations import check_config
from lcm_core.files.safetensors import read_folder, read_json
from lcm_core.networks.clip import assemble_clip
from lcm_core.networks.cross_attention import Keys
from lcm_core.networks.device import assemble, check_types

_TOKENS, _HEAD = 4, 64  # tokens that a plain one makes of a picture; numbers in a head of a plus one's layers
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of RGB
_PLUS_NAMES = (
    (r"^layers\.(\d+)\.0\.norm1\.", r"layers.\1.ln0."),
    (r"^layers\.(\d+)\.0\.norm2\.", r"layers.\1.ln1."),
    (r"^layers\.(\d+)\.0\.to_out\.", r"layers.\1.attn.to_out.0."),
    (r"^layers\.(\d+)\.0\.to_", r"layers.\1.attn.to_"),
    (r"^layers\.(\d+)\.1\.0\.", r"layers.\1.ff.0."),
    (r"^layers\.(\d+)\.1\.1\.", r"layers.\1.ff.1.net.0.proj."),
    (r"^layers\.(\d+)\.1\.3\.", r"layers.\1.ff.1.net.2."),
)
"""The names in files of plus adapters -> diffusers' names."""


@dataclass(frozen=True)
class IPAdapter:
    """A loaded IP-Adapter.

    Attributes:
        keys: each layer's weights for keys and values.
        projection: diffusers' network from what CLIP sees to tokens.
        encoder: CLIP's image encoder, of transformers.
        is_plus: whether it reads CLIP's last hidden states but one, not its summary.
    """

    keys: Sequence[Keys]
    projection: Any
    encoder: Any
    is_plus: bool

    @property
    def side(self) -> int:
        """Pixels along each side of the square that CLIP sees."""
        return int(self.encoder.config.image_size)

    @torch.no_grad()
    def tokens(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (1, T, D) of a picture (1, 3, side, side) in [0, 1], and those of none, for the negative pass."""
        mean, deviation = (torch.tensor(numbers).view(3, 1, 1) for numbers in (_MEAN, _DEVIATION))
        pixels = ((picture - mean) / deviation).to(self.encoder.device, self.encoder.dtype)
        if self.is_plus:
            both = torch.cat([pixels, torch.zeros_like(pixels)])
            seen = self.encoder(pixel_values=both, output_hidden_states=True).hidden_states[-2]
        else:
            summary = self.encoder(pixel_values=pixels).image_embeds
            seen = torch.cat([summary, torch.zeros_like(summary)])
        positive, negative = self.projection(seen).split(1)
        return positive, negative


def is_ip_adapter(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds an IP-Adapter."""
    return any(key.startswith("image_proj.") for key in tensors)


def find_image_encoder(adapter: Path, model: Path) -> Path:
    """The folder `image_encoder` beside an IP-Adapter's file, above it, or in the model's folder.

    Raises:
        InputError: there is none.
    """
    for root in (adapter.parent, adapter.parent.parent, model):
        if (root / "image_encoder" / "config.json").is_file():
            return root / "image_encoder"
    raise InputError(
        f"control {adapter} needs the image encoder that it was trained with; put its folder image_encoder, with "
        "config.json and model.safetensors, beside it"
    )


@torch.no_grad()
def load_ip_adapter(
    tensors: Mapping[str, Tensor], path: Path, encoder: Path, device: torch.device, dtype: torch.dtype
) -> IPAdapter:
    """Build an IP-Adapter from its file's tensors, frozen.

    Args:
        path: the file's, for messages.
        encoder: folder of CLIP's image encoder.

    Raises:
        InputError: it is broken, of another kind, or for another image encoder.
    """
    attention = _part(tensors, "ip_adapter.")
    check_finite(attention, path)
    check_types(Component(attention, {}, str(path)), dict.fromkeys(attention, torch.empty(0)))
    numbers = [2 * number + 1 for number in range(len(attention) // 2)]
    names = [(f"{number}.to_k_ip.weight", f"{number}.to_v_ip.weight") for number in numbers]
    if not names or attention.keys() != {name for pair in names for name in pair}:
        raise _not_an_adapter(path)
    keys = [(attention[k].to(device, dtype), attention[v].to(device, dtype)) for k, v in names]
    if any(k.ndim != 2 or k.shape != v.shape for k, v in keys):
        raise InputError(f"control {path} has keys and values of different shapes; get it again")
    eyes = _load_encoder(encoder, device, dtype)
    inside = _part(tensors, "image_proj.")
    is_plus = "latents" in inside
    build, renamed, width = (_plus if is_plus else _plain)(inside, path)
    theirs = eyes.config.hidden_size if is_plus else eyes.config.projection_dim
    if theirs != width:
        raise InputError(
            f"control {path} reads {width} numbers of CLIP, {encoder} gives {theirs}; give its own encoder"
        )
    component = Component(renamed, {}, str(path))
    return IPAdapter(keys, assemble(build, component, device, dtype, torch.contiguous_format), eyes, is_plus)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _plain(tensors: Mapping[str, Tensor], path: Path) -> tuple[Any, dict[str, Tensor], int]:
    """How to build a plain adapter's projection, its weights by diffusers' names, and the width that it reads."""
    from diffusers.models.embeddings import ImageProjection

    weight = _matrix(tensors, "proj.weight", path)
    size = {"image_embed_dim": weight.shape[1], "cross_attention_dim": weight.shape[0] // _TOKENS}
    renamed = {re.sub(r"^proj\.", "image_embeds.", key): value for key, value in tensors.items()}
    return lambda: ImageProjection(**size, num_image_text_embeds=_TOKENS), renamed, weight.shape[1]


def _plus(tensors: Mapping[str, Tensor], path: Path) -> tuple[Any, dict[str, Tensor], int]:
    """The same of a plus adapter's resampler."""
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key
        for theirs, ours in _PLUS_NAMES:
            name = re.sub(theirs, ours, name)
        if name.endswith(".to_kv.weight"):
            if value.ndim != 2 or len(value) % 2:
                raise _not_an_adapter(path)
            renamed[name.replace("to_kv", "to_k")], renamed[name.replace("to_kv", "to_v")] = value.chunk(2)
        else:
            renamed[name] = value
    first, last = (_matrix(renamed, f"proj_{end}.weight", path) for end in ("in", "out"))
    depth = len({key.split(".")[1] for key in renamed if key.startswith("layers.")})
    size: dict[str, Any] = {
        "embed_dims": first.shape[1],
        "output_dims": last.shape[0],
        "hidden_dims": first.shape[0],
        "depth": depth,
        "dim_head": _HEAD,
        "heads": _matrix(renamed, "layers.0.attn.to_q.weight", path).shape[0] // _HEAD,
        "num_queries": tensors["latents"].shape[1] if tensors["latents"].ndim == 3 else 0,
        "ffn_ratio": _matrix(renamed, "layers.0.ff.1.net.0.proj.weight", path).shape[0] / first.shape[0],
    }
    return lambda: IPAdapterPlusImageProjection(**size), renamed, first.shape[1]


def _matrix(tensors: Mapping[str, Tensor], key: str, path: Path) -> Tensor:
    weight = tensors.get(key)
    if weight is None or weight.ndim != 2 or not weight.numel():
        raise _not_an_adapter(path)
    return weight


def _not_an_adapter(path: Path) -> InputError:
    return InputError(f"control {path} is no IP-Adapter of the plain or the plus kind; give one of these")


def _load_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = read_json(folder / "config.json")
    check_config(config, str(folder / "config.json"))
    component = Component(read_folder(folder), config, str(folder))
    build: Any = CLIPVisionModelWithProjection
    return assemble_clip(lambda: build(CLIPVisionConfig.from_dict(component.config)), component, device, dtype)
