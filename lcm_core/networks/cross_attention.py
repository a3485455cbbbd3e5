"""What is changed where a U-Net looks at its text: normalised attention guidance, and pictures beside the text.

Both work on the attention's output before its last matrix, so the layers are computed here with their own weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lcm_core.errors import InputError
from lcm_core.files.safetensors import PathLike
from lcm_core.networks.conditioning import repeat_alike
from lcm_core.networks.cpu.optimise import CrossAttention
from lcm_core.networks.unet import UNet

Matrix = Callable[[Tensor], Tensor]
Keys = tuple[Tensor, Tensor]
"""Weights (C, D) that make keys and values of a picture's tokens in one layer."""


@dataclass(frozen=True)
class Nag:
    """Normalised attention guidance (arXiv 2505.21179): a negative prompt without a pass of its own.

    >>> Nag(3.0)
    Nag(scale=3.0, tau=2.5, alpha=0.5)
    """

    scale: float = 1.0
    """How far away from the negative prompt; 1 is off."""
    tau: float = 2.5
    """Times the length of the positive prompt's attention that the result may have."""
    alpha: float = 0.5
    """Share of the result; the rest is the positive prompt's attention."""

    @property
    def is_on(self) -> bool:
        """Whether it changes anything."""
        return self.scale != 1 and self.alpha != 0

    def mix(self, positive: Tensor, negative: Tensor) -> Tensor:
        """z = alpha z~ min(tau, r) / r + (1 - alpha) z+, with z~ = scale z+ - (scale - 1) z-, r = |z~|_1 / |z+|_1.

        Args:
            positive, negative: attention (B, N, C) to either prompt; lengths are those of each pixel's C numbers.
        """
        away = torch.lerp(negative, positive, self.scale)
        longer = away.norm(p=1, dim=-1, keepdim=True) / positive.norm(p=1, dim=-1, keepdim=True)
        # times tau / r where r is above tau; 0 / 0 is a pixel without attention, which stays
        return torch.lerp(positive, away * (self.tau / longer.nan_to_num(1.0)).clamp(max=1), self.alpha)


@dataclass(frozen=True)
class Attended:
    """What is attended to beside the text."""

    nag: Nag = Nag()
    pictures: Sequence[tuple[Sequence[Keys], float]] = ()
    """Each picture's weights, layer by layer, and its strength."""


@dataclass(frozen=True)
class _Layer:
    """The matrices of a cross-attention, of diffusers' or of one that is packed for the CPU."""

    q: Matrix
    k: Matrix
    v: Matrix
    out: Matrix
    heads: int
    shape: tuple[int, ...]
    """(C, D) of its keys' weights."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, C) attention of queries (B, N, C) to keys and values (B, T, C)."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attending(unet: UNet, attended: Attended) -> Callable[..., Tensor]:
    """A U-Net that attends to more than its text.

    Returns:
        As `unet`, with two further inputs: `negative_states` (B, T, D), the negative prompt of `attended.nag`, and
        `picture_tokens`, for each number of a picture ("0", ...) its tokens (B, T, D).

    Raises:
        InputError: this U-Net computes attention in a way of its own.
    """
    layers = list(_layers(unet.model))
    plain = copy.copy(unet)
    plain.forward = unet.model  # what is recorded of its calls does not know the changed layers

    def network(
        x: Tensor,
        t: Tensor,
        negative_states: Tensor | None = None,
        picture_tokens: Mapping[str, Tensor] | None = None,
        **cond: Any,
    ) -> Tensor:
        tokens = [_like(unet, rows) for rows in (picture_tokens or {}).values()]
        if negative_states is not None:
            alike = {"text": _like(unet, cond.pop("encoder_hidden_states"))}, {"text": _like(unet, negative_states)}
            text, negative = (row["text"] for row in repeat_alike(*alike))
            cond["encoder_hidden_states"], negative_states = text, negative
        with _changed(layers, attended, negative_states, tokens):
            return plain(x, t, **cond)

    return network


def check_keys(keys: Sequence[Keys], unet: UNet, path: PathLike) -> None:
    """Refuse a picture's weights for a U-Net of other layers.

    Raises:
        InputError: names both.
    """
    theirs, ours = [tuple(k.shape) for k, _ in keys], [layer.shape for _, layer in _layers(unet.model)]
    if theirs != ours:
        raise InputError(
            f"control {path} is for a U-Net with {len(theirs)} layers that read text, the first of shape {theirs[0]}; "
            f"this model has {len(ours)}, the first of {ours[0]}; give one made for it"
        )


def _like(unet: UNet, states: Tensor) -> Tensor:
    return states.to(unet.device, unet.dtype)


def _layers(model: nn.Module) -> Iterator[tuple[Any, _Layer]]:
    """The cross-attentions in diffusers' order, in which files of IP-Adapters count them."""
    for name, module in model.named_modules():
        attn: Any = module
        if isinstance(attn, CrossAttention):
            q, k, v = (partial(functional.linear, weight=weight) for weight in (attn.q, attn.k, attn.v))
            out = partial(functional.linear, weight=attn.out, bias=attn.bias)
            yield attn, _Layer(q, k, v, out, attn.heads, tuple(attn.k.shape))
        elif name.endswith("attn2"):
            kind = type(attn.processor).__name__
            if kind not in ("AttnProcessor", "AttnProcessor2_0") or attn.norm_cross is not None:
                raise InputError(f"attention is computed by {kind} here; nag and IP-Adapters need the usual kind")
            shape = tuple(attn.to_k.weight.shape)
            yield attn, _Layer(attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], attn.heads, shape)


@contextmanager
def _changed(
    layers: Sequence[tuple[Any, _Layer]], attended: Attended, negative: Tensor | None, tokens: Sequence[Tensor]
) -> Iterator[None]:
    """The layers with what they attend to, for one call."""
    for number, (module, layer) in enumerate(layers):
        pictures = [
            (keys[number], strength, rows) for (keys, strength), rows in zip(attended.pictures, tokens, strict=True)
        ]
        module.forward = _forward(module, partial(_attention, layer, attended.nag, negative, pictures))
    try:
        yield
    finally:
        for module, _ in layers:
            del module.forward


def _forward(module: Any, attention: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def packed(x: Tensor, text: Tensor, residual: Tensor) -> Tensor:
        return residual + attention(x, text)

    def plain(hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        return attention(hidden_states, encoder_hidden_states)

    return packed if isinstance(module, CrossAttention) else plain


def _attention(
    layer: _Layer,
    nag: Nag,
    negative: Tensor | None,
    pictures: Sequence[tuple[Keys, float, Tensor]],
    x: Tensor,
    text: Tensor,
) -> Tensor:
    """Attention (B, N, C) of x (B, N, C) to text (B, T, D), and to what else there is."""
    q = layer.q(x)
    total = layer.attend(q, layer.k(text), layer.v(text))
    if negative is not None:
        total = nag.mix(total, layer.attend(q, layer.k(negative), layer.v(negative)))
    for (k, v), strength, rows in pictures:
        total = total + strength * layer.attend(q, functional.linear(rows, k), functional.linear(rows, v))
    return layer.out(total)
