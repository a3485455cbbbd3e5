"""Several LoRAs as one file that does what they do together, each with its strength.

Plain LoRAs join exactly: `sum_i s_i up_i down_i` is one product, of all `up_i` side by side and all `down_i` above each
other. What other kinds add to a weight (LoHa, LoKr, DoRA, Tucker form) is written as the nearest plain LoRA of a given
rank, by a singular value decomposition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lcm_core.files import lora_keys
from lcm_core.files.lora import Lora, fitting
from lcm_core.files.lora_keys import Part
from lcm_core.files.lora_tensors import LoraLayer

Halves = tuple[Tensor, Tensor]
"""(down (r, in, ...), up (out, r, ...)) of a layer, with all scales inside."""
_PLAIN = {"down", "up"}
_MORE = 8  # columns beyond the rank that the decomposition looks at


def join(
    loras: Sequence[tuple[Lora, float]],
    part: Part,
    weights: Mapping[str, Tensor],
    rank: int,
    other_names: Mapping[str, str] | None = None,
) -> tuple[dict[str, Halves], float]:
    """The layers of one network.

    Args:
        loras: with their strengths.
        part: which of the LoRAs' networks.
        weights: of the network, `<path>.weight` -> (out, in, ...).
        rank: of what is no plain LoRA.
        other_names: see `lora_keys.flat_names`.

    Returns:
        Path of a layer -> its halves, float32; and the largest share of a change that its rank leaves out.

    Raises:
        InputError: a LoRA is for another architecture.
    """
    ends = ".weight"
    shapes = {key.removesuffix(ends): value.shape for key, value in weights.items() if key.endswith(ends)}
    names = lora_keys.flat_names([path for path, shape in shapes.items() if len(shape) > 1], part, other_names)
    found: dict[str, list[Halves]] = {}
    lost = 0.0
    for lora, strength in loras:
        for flat, layer in fitting(lora, part, names, shapes).items():
            halves, left_out = _halves(layer, weights[names[flat] + ends], rank)
            found.setdefault(names[flat], []).append((halves[0], strength * halves[1]))
            lost = max(lost, left_out)
    joined = {}
    for path, pairs in found.items():
        downs, ups = zip(*pairs, strict=True)
        kernel = shapes[path][2:]
        down, up = torch.cat(downs), torch.cat(ups, dim=1)
        joined[path] = (down.reshape(len(down), -1, *kernel), up.reshape(*up.shape, *[1] * len(kernel)))
    return joined, lost


def to_kohya(layers: Mapping[str, Halves], prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Layers in kohya's layout, `<prefix><path>.lora_down.weight` and so on."""
    state: dict[str, Tensor] = {}
    for path, (down, up) in layers.items():
        name = prefix + path.replace(".", "_")
        state[f"{name}.lora_down.weight"] = down.to(dtype).contiguous()
        state[f"{name}.lora_up.weight"] = up.to(dtype).contiguous()
        state[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return state


def to_diffusers(
    layers: Mapping[str, Halves], folder: str, names: Mapping[str, str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Layers of a transformer as `lora_layers.transformer_lora_state_dict` has them."""
    prefix = "diffusion_model" if names else folder
    state: dict[str, Tensor] = {}
    for path, (down, up) in layers.items():
        name = f"{prefix}.{lora_keys.renamed(path, names)}"
        state[f"{name}.lora_A.weight"] = down.to(dtype).contiguous()
        state[f"{name}.lora_B.weight"] = up.to(dtype).contiguous()
    return state


def _halves(layer: LoraLayer, weight: Tensor, rank: int) -> tuple[Halves, float]:
    """A layer as matrices (r, in * kernel) and (out, r), and the share of its change that they leave out."""
    if layer.kind == "LoRA" and layer.factors.keys() == _PLAIN and layer.magnitude is None:
        return (layer.down.float().flatten(1), layer.up.float().flatten(1) * layer.scale), 0.0
    change = layer.change(weight.float()).flatten(1)
    kept = min(rank, *change.shape)
    u, s, v = torch.svd_lowrank(change, q=min(kept + _MORE, *change.shape), niter=4)
    size = change.norm()
    near = u[:, :kept] * s[:kept]
    lost = 0.0 if size == 0 else float((change - near @ v[:, :kept].T).norm() / size)
    return (v[:, :kept].T.contiguous(), near), lost
