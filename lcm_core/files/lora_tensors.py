"""From a LoRA file's tensors to checked layers: the only door that they come in by."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files import lora_keys
from lcm_core.files import safetensors as weights
from lcm_core.files.lora_formulas import Factors, decompose, delta_loha, delta_lokr, delta_lora, magnitude_axis
from lcm_core.files.lora_keys import Part

Layers = dict[Part, dict[str, "LoraLayer"]]
_PRODUCTS: dict[str, tuple[Callable[[Factors], Tensor], str, tuple[str, ...]]] = {
    "LoRA": (delta_lora, "down up", ("down",)),
    "LoHa": (delta_loha, "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", ("hada_w1_b",)),
    "LoKr": (delta_lokr, "lokr_w1 lokr_w2", ("lokr_w2_b", "lokr_w1_b")),
}
"""What each kind has: its formula, the factors that it must have (LoKr's may come as pairs `_a`, `_b`), and those whose
first dimension is the rank."""
_OPTIONAL = {
    "LoRA": {"mid"},
    "LoHa": {"hada_t1", "hada_t2"},
    "LoKr": {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
}
_ABOUT = {"alpha", "dora_scale", "magnitude"}
"""Roles that are no factors."""
_KOHYA_NAMES = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}

_REPEATS = re.compile(r"[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
"""What makes the time of a match grow without bound; no pattern that peft writes needs it."""


@dataclass(frozen=True)
class LoraLayer:
    """What an adapter does to one layer: `scale * product of its factors`, and, in a DoRA, new norms."""

    kind: str
    """LoRA, LoHa or LoKr."""
    factors: Factors
    """Tensors by role; shapes in `lora_formulas`."""
    rank: int | None
    """The width of the bottleneck; None for a LoKr whose two factors are whole."""
    alpha: float | None
    """The product is scaled by alpha / rank; None where there is no rank."""
    magnitude: Tensor | None = None
    """A DoRA's norms; shapes in `lora_formulas.decompose`."""

    @property
    def down(self) -> Tensor:
        """A LoRA's first half, (rank, in) or (rank, in, kh, kw)."""
        return self.factors["down"]

    @property
    def up(self) -> Tensor:
        """A LoRA's second half, (out, rank) or (out, rank, 1, 1)."""
        return self.factors["up"]

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    def delta(self, shape: Sequence[int]) -> Tensor:
        """The scaled product for a weight of this shape, float32, on the LoRA's device."""
        return (_PRODUCTS[self.kind][0](self.factors) * self.scale).reshape(tuple(shape))

    def change(self, weight: Tensor) -> Tensor:
        """All that the layer adds to a weight, float32, on the LoRA's device. Only a DoRA reads the weight itself."""
        delta = self.delta(weight.shape)
        if self.magnitude is None:
            return delta
        return decompose(weight.to(delta.device, torch.float32), delta, self.magnitude)

    def matrix_shape(self) -> tuple[int, int]:
        """(outputs, inputs * kernel) of the weight that it is for."""
        meta = {role: factor.to("meta") for role, factor in self.factors.items()}
        rows, columns = _PRODUCTS[self.kind][0](meta).shape
        return rows, columns

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a weight of this shape can take it; linear layers and 1x1 convolutions are the same."""
        if len(shape) < 2 or self.matrix_shape() != (shape[0], torch.Size(shape[1:]).numel()):
            return False
        return self.magnitude is None or self.magnitude.numel() == shape[magnitude_axis(self.magnitude, shape)]

    def to_kohya(self) -> dict[str, Tensor]:
        """Its tensors as kohya's and LyCORIS' files name them below the module's name."""
        state = {_KOHYA_NAMES.get(role, role): factor for role, factor in self.factors.items()}
        if self.alpha is not None:
            state["alpha"] = torch.tensor(self.alpha)
        if self.magnitude is not None:
            ones = [1] * (max(factor.ndim for factor in self.factors.values()) - 1)  # peft's has one dimension
            state["dora_scale"] = self.magnitude.reshape(-1, *ones) if self.magnitude.ndim == 1 else self.magnitude
        return state


def read_layers(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], alpha: float | None) -> Layers:
    """Sort the tensors of a LoRA file into layers.

    Args:
        tensors: by the file's keys, whatever the layout.
        settings: peft's configuration, or several by `Part`; empty for other layouts.
        alpha: where neither the tensors nor the settings have one; None takes the rank.

    Raises:
        InputError: an unknown key, an unusable tensor, an incomplete layer, or factors that do not join.
    """
    modules: dict[tuple[Part, str], tuple[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        address = lora_keys.parse_key(key)
        _check_tensor(key, address.role, tensor)
        _, found = modules.setdefault((address.part, address.path.replace(".", "_")), (address.path, {}))
        if address.role in found:
            raise InputError(f"its module '{address.path}' has two tensors '{address.role}' (one is '{key}')")
        found[address.role] = tensor
    layers: Layers = {}
    for (part, flat), (path, found) in modules.items():
        own = settings.get(part, settings)
        layers.setdefault(part, {})[flat] = _layer(path, found, own if isinstance(own, dict) else {}, alpha)
    if not layers:
        raise InputError("it holds no tensors; give a LoRA file")
    return layers


def _check_tensor(key: str, role: str, tensor: Tensor) -> None:
    name = str(tensor.dtype).removeprefix("torch.")
    whole_alpha = role == "alpha" and name.startswith(("int", "uint"))
    if not whole_alpha and name not in ("float64", "float32", "float16", "bfloat16") and not name.startswith("float8"):
        raise InputError(
            f"its tensor '{key}' is stored as {name}, in which a LoRA has no meaning; get it in float32, float16, "
            "bfloat16 or float8"
        )
    if role == "alpha" and tensor.numel() != 1:
        raise InputError(f"its '{key}' has shape {tuple(tensor.shape)} instead of one number; get the file again")
    if role != "alpha" and tensor.ndim == 0:
        raise InputError(f"its tensor '{key}' is a single number; get the file again")
    if tensor.numel() == 0:
        raise InputError(f"its tensor '{key}' of shape {tuple(tensor.shape)} is empty (rank 0?); get the file again")
    # a float8 tensor cannot be summed as it is
    weights.check_finite({key: tensor.float() if tensor.element_size() == 1 else tensor}, "the LoRA")


def _layer(path: str, found: dict[str, Tensor], settings: Mapping[str, Any], alpha: float | None) -> LoraLayer:
    kind = _kind(path, found)
    magnitude = found.get("dora_scale")
    if "magnitude" in found:  # peft's has its numbers in the second dimension for a convolution
        magnitude = found["magnitude"].flatten()
    factors = {role: factor for role, factor in found.items() if role not in _ABOUT}
    rank = next((factors[role].shape[0] for role in _PRODUCTS[kind][2] if role in factors), None)
    layer = LoraLayer(kind, factors, rank, None, magnitude)
    shapes = ", ".join(str(tuple(factor.shape)) for factor in factors.values())
    try:
        if min(factor.ndim for factor in factors.values()) < 2:
            raise RuntimeError("a factor without columns")
        layer.matrix_shape()
    except (RuntimeError, ValueError, KeyError) as error:
        word = "halves" if kind == "LoRA" else "factors"
        raise InputError(f"its module '{path}' has {word} {shapes} that do not join; get the file again") from error
    stated = _stated_alpha(settings, path, rank)
    if rank is None:  # LyCORIS' whole factors have no scale, whatever alpha says; peft scales them as well
        if stated is not None and "alpha" not in found:
            factors["lokr_w2"] = factors["lokr_w2"].float() * stated
        return layer
    value = found["alpha"].item() if "alpha" in found else stated
    return replace(layer, alpha=float(value if value is not None else rank if alpha is None else alpha))


def _kind(path: str, found: Mapping[str, Tensor]) -> str:
    for kind, (_, needed, _) in _PRODUCTS.items():
        have = [role for role in needed.split() if role in found or {f"{role}_a", f"{role}_b"} <= found.keys()]
        if len(have) == len(needed.split()):
            if odd := found.keys() - {*needed.split(), *_OPTIONAL[kind], *_ABOUT}:
                raise InputError(f"its module '{path}' is a {kind} but has {', '.join(sorted(odd))} too; get it again")
            return kind
    raise InputError(f"its module '{path}' has only {', '.join(found)}; get the file again")


def _stated_alpha(settings: Mapping[str, Any], path: str, rank: int | None) -> float | None:
    """Alpha by peft's configuration; a rank-stabilised scale is alpha / sqrt(rank). Without rank: the scale."""
    value = _by_pattern(settings, path, "lora_alpha" if "lora_alpha" in settings else "alpha", "alpha_pattern")
    if value is None:
        return None
    if rank is None:
        r = _by_pattern(settings, path, "r", "rank_pattern")
        return value / r if r else None
    return value * rank**0.5 if settings.get("use_rslora") else value


def _by_pattern(settings: Mapping[str, Any], path: str, name: str, patterns: str) -> float | None:
    """A number of peft's configuration, which another may replace in modules whose names match a pattern."""
    value = settings.get(name)
    others = settings.get(patterns) or {}
    if not isinstance(others, dict):
        raise InputError(f"its settings have a {patterns} that is no JSON object; correct or remove it")
    for pattern, other in others.items():
        if len(pattern) > 256 or len(_REPEATS.findall(pattern)) > 2 or _REPEATED_GROUP.search(pattern):
            raise InputError(
                f"its settings have the {patterns} {pattern[:60]!r}, which might match for ever; write out the names"
            )
        try:
            value = other if re.fullmatch(rf"(.*\.)?({pattern})", path) else value
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(
                f"its settings have the {patterns} {pattern!r}, which is no regular expression ({error}); correct it"
            ) from error
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e30):
        raise InputError(f"its settings have {name} {value!r}, which is no number that can scale a LoRA; correct it")
    return value
