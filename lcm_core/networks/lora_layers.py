"""Trainable LoRA on a U-Net: plain torch modules around its layers, that can be switched off or to their average.

One network then plays all parts (arXiv 2311.05556): the teacher is the network with its adapters off, the online
student has them on, the target has their exponential moving average, and a critic has adapters of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional

from lcm_core.errors import InputError
from lcm_core.files.lora_keys import renamed

Which = Literal["online", "ema", "critic", "off"]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = nn.Linear | Convolution
TARGET_MODULES = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""Ends of the module names that an LCM-LoRA covers: 67.3 M weights at rank 64 on SD 1.5 (arXiv 2311.05556: 67.5 M)."""


class LoraModule(nn.Module):
    """A frozen layer plus `strength * alpha / rank * up(down(x))`.

    Attributes:
        base: the layer that it stands for.
        down, up: the trained halves, float32 by default; `up` starts at zero, so nothing changes at first.
        others: further pairs of halves: "ema" (after `start_ema`), "critic" (after `add_critic`).
        use: "online", one of the others, or "off".
        strength: multiplies the addition; 1 is as trained.
    """

    def __init__(self, base: Layer, rank: int, alpha: float) -> None:
        super().__init__()
        self.base: Layer = base.requires_grad_(False)
        self.rank, self.alpha = rank, float(alpha)
        self.down, self.up = self.new_halves()
        self.others = nn.ModuleDict()
        self.strength = 1.0
        self.use: Which = "online"

    @property
    def weight(self) -> Tensor:
        """The frozen layer's weight, for code that asks a layer for its dtype or shape."""
        return self.base.weight

    def halves(self, which: Which = "online") -> tuple[Layer, Layer]:
        """`down` and `up`, or another pair of them."""
        if which == "online":
            return self.down, self.up
        if which not in self.others:
            raise ValueError(f"these adapters have no {which} halves; call start_ema or add_critic first")
        pair: Any = self.others[which]
        return pair[0], pair[1]

    def new_halves(self) -> tuple[Layer, Layer]:
        """`down` and `up` with first weights, with which nothing changes."""
        down, up = _make_halves(self.base, self.rank)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        return down, up

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, with the addition unless it is off."""
        output = self.base(x)
        if self.use == "off" or self.strength == 0:
            return output
        down, up = self.halves(self.use)
        # The small weights follow the large activations' format, not the other way round: a second copy of those would
        # be kept for the backward pass.
        addition = _apply(up, _apply(down, x)) * (self.strength * self.alpha / self.rank)
        return output + addition


def _apply(layer: Layer, x: Tensor) -> Tensor:
    """The layer without bias, computed in the format of x."""
    weight = layer.weight.to(x.dtype)
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight)
    run: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[weight.ndim - 3]
    result: Tensor = run(x, weight, None, layer.stride, layer.padding, layer.dilation)
    return result


def _make_halves(base: Layer, rank: int) -> tuple[Layer, Layer]:
    """The two layers of an adapter. For a convolution the first has its kernel and stride, the second is 1x1."""
    options: dict[str, Any] = {"bias": False, "device": base.weight.device}
    if isinstance(base, nn.Linear):
        return nn.Linear(base.in_features, rank, **options), nn.Linear(rank, base.out_features, **options)
    shape: Any = (base.kernel_size, base.stride, base.padding, base.dilation)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[base.weight.ndim - 3]  # not a host's own class
    return kind(base.in_channels, rank, *shape, **options), kind(rank, base.out_channels, 1, **options)


@dataclass
class LoraAdapters:
    """The LoRA modules that `add_lora` put into a network, by the path of the layer that each stands for."""

    layers: dict[str, LoraModule]

    def parameters(self) -> list[Tensor]:
        """What to train."""
        return [half.weight for layer in self.layers.values() for half in layer.halves()]

    @contextmanager
    def using(self, which: Which) -> Iterator[None]:
        """Let the network, within this context, run with its adapters "online", averaged ("ema"), "critic", or
        "off"."""
        layers = list(self.layers.values())
        before = [layer.use for layer in layers]
        _switch(layers, [which] * len(layers))
        try:
            yield
        finally:
            _switch(layers, before)

    def start_ema(self) -> None:
        """Begin the average with the present weights."""
        for layer in self.layers.values():
            layer.others["ema"] = nn.ModuleList(layer.new_halves()).requires_grad_(False)
        self.update_ema(0.0)

    def add_critic(self) -> None:
        """Give the network a second set of adapters to train, with which it starts as it is without any."""
        for layer in self.layers.values():
            layer.others["critic"] = nn.ModuleList(layer.new_halves())

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """`ema = decay * ema + (1 - decay) * online`."""
        for layer in self.layers.values():
            for average, half in zip(layer.halves("ema"), layer.halves(), strict=True):
                average.weight.lerp_(half.weight, 1 - decay)


def add_lora(
    model: nn.Module, rank: int, alpha: float | None = None, target_modules: Sequence[str] = TARGET_MODULES
) -> LoraAdapters:
    """Put trainable LoRA modules into a network, which is frozen otherwise. Until they are trained its output stays.

    Args:
        model: a diffusers U-Net, or any other network of linear layers and convolutions.
        rank: width of the bottleneck, at least 1.
        alpha: the addition is scaled by alpha / rank; None takes the rank, so that the scale is 1.
        target_modules: ends of the names of the layers to adapt, at a dot.

    Raises:
        InputError: a bad rank, or no such layer.
    """
    if rank < 1:
        raise InputError(f"LoRA rank {rank} is too small; use 1 or more (64 is usual)")
    model.requires_grad_(False)
    ends = tuple(f".{name}" for name in target_modules)
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, Layer) and f".{path}".endswith(ends)
    ]
    if not found:
        raise InputError(f"the network has no modules named {', '.join(target_modules)}; choose others")
    layers: dict[str, LoraModule] = {}
    for path, module in found:
        layers[path] = LoraModule(module, rank, rank if alpha is None else alpha)
        _replace(model, path, layers[path])
    return LoraAdapters(layers)


def remove_lora(model: nn.Module) -> None:
    """Put the plain layers back."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraModule):
            _replace(model, path, module.base)


def lora_state_dict(model: nn.Module, ema: bool = False, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The adapters of a network in kohya's layout, which every UI reads: `lora_unet_<path>.lora_down.weight` and so on.

    Args:
        model: what `add_lora` was given.
        ema: the averaged adapters instead of the online ones.
        dtype: None keeps the adapters' own.
    """
    state: dict[str, Tensor] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraModule):
            name = f"lora_unet_{path.replace('.', '_')}"
            for half, module in zip(("down", "up"), layer.halves("ema" if ema else "online"), strict=True):
                state[f"{name}.lora_{half}.weight"] = module.weight.detach().to(dtype or module.weight.dtype)
            state[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return state


def transformer_lora_state_dict(
    model: nn.Module,
    names: Mapping[str, str],
    ema: bool = False,
    dtype: torch.dtype | None = None,
    folder: str = "transformer",
) -> dict[str, Tensor]:
    """The adapters of a transformer as diffusers and ComfyUI both read them: `<path>.lora_A.weight`, `.lora_B.weight`,
    with alpha / rank inside the second.

    Args:
        model: what `add_lora` was given.
        names: ends of paths -> of those that ComfyUI has, for families that it knows by other names than diffusers.
        ema: the averaged adapters instead of the online ones.
        dtype: None keeps the adapters' own.
        folder: what diffusers calls the network.
    """
    state: dict[str, Tensor] = {}
    prefix = "diffusion_model" if names else folder
    for path, layer in model.named_modules():
        if isinstance(layer, LoraModule):
            down, up = (half.weight.detach() for half in layer.halves("ema" if ema else "online"))
            name = f"{prefix}.{renamed(path, names)}"
            state[f"{name}.lora_A.weight"] = down.to(dtype or down.dtype)
            state[f"{name}.lora_B.weight"] = (up * (layer.alpha / layer.rank)).to(dtype or up.dtype)
    return state


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], ema: bool = False) -> None:
    """Give a network's adapters the weights that `lora_state_dict` returned. Another alpha is folded into them.

    Raises:
        InputError: other layers, or another rank.
    """
    own = check_lora_state_dict(model, state, ema)
    for key, tensor in own.items():
        if not key.endswith(".alpha"):
            alpha = f"{key.partition('.')[0]}.alpha"
            scale = float(state[alpha] / own[alpha]) if ".lora_up." in key else 1.0
            tensor.copy_(state[key] * scale)


def check_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], ema: bool = False) -> dict[str, Tensor]:
    """The adapters' own weights, once those of `state` are known to have the same names and shapes.

    Raises:
        InputError: other layers, or another rank.
    """
    own = lora_state_dict(model, ema)
    if odd := own.keys() ^ state.keys():
        raise InputError(f"these LoRA weights do not belong to this network's adapters (they differ in '{min(odd)}')")
    if odd := {key for key in own if own[key].shape != state[key].shape}:
        first = min(odd)
        raise InputError(
            f"these LoRA weights do not belong to this network's adapters ('{first}' is {tuple(state[first].shape)} "
            f"instead of {tuple(own[first].shape)}); give the rank that they were made with"
        )
    return own


def checkpoint(block: nn.Module, *args: Any) -> Any:
    """Gradient checkpointing of one block of a network: its second forward pass, which happens whenever the backward
    pass comes by, runs with the adapters that the first had."""
    layers = [module for module in block.modules() if isinstance(module, LoraModule)]
    uses = [layer.use for layer in layers]

    def run(*args: Any) -> Any:
        now = [layer.use for layer in layers]
        _switch(layers, uses)
        try:
            return block(*args)
        finally:
            _switch(layers, now)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)


def _switch(layers: Iterable[LoraModule], uses: Iterable[Which]) -> None:
    for layer, use in zip(layers, uses, strict=True):
        layer.use = use


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
