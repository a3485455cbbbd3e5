"""The same networks, faster on a CPU: diffusers' blocks rewritten on packed layers. The pictures stay the same.

Most valuable first:
- Long self-attention in two matrix products (`packed.attention`), in bfloat16.
- Weights packed once, not in every call (`packed.PackedLinear`, `packed.PackedConv2d`).
- Convolutions before, not after, doubling a picture (`packed.FoldedUpsample`).
- Text folded into the cross-attention's matrices once per prompt, not once per step (`CrossAttention`).
- Biases, activations, products and residual sums inside the matrix products; nothing copied, nothing divided by 1.

On other devices the fused kernels behind torch's own functions are best, and networks stay as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lcm_core.errors import InputError
from lcm_core.networks.cpu.packed import FoldedUpsample, PackedConv2d, PackedLinear, attention, can_pack

Module = TypeVar("Module", bound=nn.Module)

LONG = 1024
"""Tokens from which on `packed.attention` beats torch's fused kernel in bfloat16. In float32, on AVX2, it took half as
long again at 4096 tokens, and nearly twice as long at 1024."""
_TRANSFORMER_PARTS = {
    *("Transformer2DModel", "BasicTransformerBlock", "Attention", "FeedForward", "GEGLU"),
    *("ModuleList", "GroupNorm", "LayerNorm", "Linear", "Conv2d", "Dropout"),
}
_RESNET_PARTS = {"ResnetBlock2D", "GroupNorm", "Conv2d", "Linear", "SiLU", "Dropout"}


def optimise_unet(unet: Module) -> Module:
    """Make a frozen UNet2DConditionModel fast on this machine's CPU, in place.

    Merge LoRA files before: afterwards the weights lie packed inside the layers, and the network can only be called. It
    has no gradients and no state dict worth saving, stays on its device and in its number format, and takes no
    attention masks. Layers that are not diffusers' or torch's own, such as LoRA adapters, are left alone.

    Args:
        unet: in evaluation mode. No weight is held twice afterwards.

    Returns:
        The same object; untouched on other devices, in float16, and on processors without AVX2.

    Raises:
        InputError: weights are being trained.
    """
    if any(parameter.requires_grad for parameter in unet.parameters()):
        raise InputError(f"this {type(unet).__name__} has weights under training; freeze it before optimise_unet")
    weight = next(unet.parameters())
    if weight.device.type == "cpu" and can_pack(weight.dtype):
        _replace_layers(unet)
    return unet


optimise_vae = optimise_unet
"""The same for an AutoencoderKL or AutoencoderTiny."""


class Resnet(nn.Module):
    """diffusers' ResnetBlock2D with the faster layers."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, PackedConv2d(block.conv1)
        self.norm2, self.conv2 = block.norm2, PackedConv2d(block.conv2)
        projection, shortcut = block.time_emb_proj, block.conv_shortcut
        self.time = None if projection is None else PackedLinear(projection.weight, projection.bias)
        self.shortcut = None if shortcut is None else PackedConv2d(shortcut)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x: (B, C, H, W); temb: (B, E) time embedding."""
        hidden = self.conv1(functional.silu(self.norm1(x), inplace=True))
        if self.time is not None and temb is not None:
            hidden += self.time(functional.silu(temb))[:, :, None, None]
        hidden = functional.silu(self.norm2(hidden), inplace=True)
        return self.conv2(hidden, x if self.shortcut is None else self.shortcut(x))


class Transformer(nn.Module):
    """Transformer2DModel with its blocks; from end to end the pixels are the rows of (B, H W, C), without a copy."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm = model.norm
        self.proj_in = PackedLinear(model.proj_in.weight, model.proj_in.bias)
        self.blocks = nn.ModuleList(TransformerBlock(block) for block in model.transformer_blocks)
        self.proj_out = PackedLinear(model.proj_out.weight, model.proj_out.bias)

    def forward(self, x: Tensor, encoder_hidden_states: Tensor, **others: Any) -> tuple[Tensor]:
        """x: (B, C, H, W); encoder_hidden_states: (B, T, D) text.

        Raises:
            ValueError: an attention mask was given.
        """
        if any(others.get(name) is not None for name in ("attention_mask", "encoder_attention_mask")):
            raise ValueError("an attention mask was given to an optimised U-Net; leave out the mask or optimise_unet")
        batch, channels, height, width = x.shape
        tokens = self.proj_in(_rows(self.norm(x)))
        for block in self.blocks:
            tokens = block(tokens, encoder_hidden_states)
        rows = self.proj_out(tokens, _rows(x), "add")
        return (rows.view(batch, height, width, channels).permute(0, 3, 1, 2),)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H W, C); no copy in channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class TransformerBlock(nn.Module):
    """BasicTransformerBlock: self-attention, cross-attention and a gated feed-forward network, each with a residual."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        own, out = block.attn1, block.attn1.to_out[0]
        self.heads = own.heads
        self.qkv = PackedLinear(torch.cat([own.to_q.weight, own.to_k.weight, own.to_v.weight]))
        self.out = PackedLinear(out.weight, out.bias)
        self.cross_attention = CrossAttention(block.attn2)
        gated, last = block.ff.net[0].proj, block.ff.net[2]
        (value, gate), (value_bias, gate_bias) = gated.weight.chunk(2), gated.bias.chunk(2)
        self.value, self.gate = PackedLinear(value, value_bias), PackedLinear(gate, gate_bias)
        self.last = PackedLinear(last.weight, last.bias)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x: (B, N, C); text: (B, T, D)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        is_long = x.shape[1] >= LONG and x.dtype == torch.bfloat16
        attend = attention if is_long else functional.scaled_dot_product_attention
        x = self.out(attend(q, k, v).transpose(1, 2).flatten(2), x, "add")
        x = self.cross_attention(self.norm2(x), text, x)
        normed = self.norm3(x)
        return self.last(self.value(normed, self.gate(normed, operation="gelu"), "mul"), x, "add")


class FoldedText(NamedTuple):
    """Cross-attention's two matrices for one text of T tokens."""

    scores: PackedLinear  # from C channels to H T scores
    mix: PackedLinear  # from H T weights to C channels


class CrossAttention(nn.Module):
    """Attention to text, whose keys and values are the same in every step.

    `q k^T = x (W_q^T k^T)` and `(weights v) W_out^T = weights (v W_out^T)`. What stands in brackets depends on the
    prompt alone, and is about as large as W_q and W_out themselves.
    """

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.heads, self.scale = attn.heads, attn.scale
        self.q, self.k, self.v = (layer.weight.detach() for layer in (attn.to_q, attn.to_k, attn.to_v))
        self.out, self.bias = attn.to_out[0].weight.detach(), attn.to_out[0].bias
        self.text: Tensor | None = None
        self.folded: list[FoldedText] = []

    def forward(self, x: Tensor, text: Tensor, residual: Tensor) -> Tensor:
        """x, residual: (B, N, C); text: (B, T, D). Returns `residual` plus what the attention gives."""
        if self.text is None or not torch.equal(self.text, text):  # by value: callers cast, reuse and rewrite tensors
            self.text = text.clone()
            self.folded = [self._fold(one) for one in text]
        pictures = [self._attend(*parts) for parts in zip(x, self.folded, residual, strict=True)]
        return torch.stack(pictures) if len(pictures) > 1 else pictures[0][None]

    def _attend(self, x: Tensor, folded: FoldedText, residual: Tensor) -> Tensor:
        weights = folded.scores(x).unflatten(-1, (self.heads, -1)).softmax(-1)  # (N, H, T)
        return folded.mix(weights.flatten(1), residual, "add")

    def _fold(self, text: Tensor) -> FoldedText:
        from einops import rearrange  # what runs in every step does without: 4 microseconds more for each call

        h, rows, columns = self.heads, "(h d) c -> h d c", "c (h d) -> c h d"
        k, v = (rearrange(functional.linear(text, weight).float(), columns, h=h) for weight in (self.k, self.v))
        k = k - k.mean(0)  # moves all scores of a row alike, and makes them small, so that little is rounded off
        scores = torch.einsum("thd,hdc->htc", k, rearrange(self.q.float(), rows, h=h)) * self.scale
        mix = torch.einsum("chd,thd->cht", rearrange(self.out.float(), columns, h=h), v)
        scores, mix = rearrange(scores, "h t c -> (h t) c").to(text.dtype), rearrange(mix, "c h t -> c (h t)")
        return FoldedText(PackedLinear(scores), PackedLinear(mix.to(text.dtype), self.bias))


def _replace_layers(module: nn.Module) -> None:
    for name, child in module.named_children():
        fast = _fast_layer(child)
        if fast is not None:
            setattr(module, name, fast)
        elif type(child).__module__.partition(".")[0] in ("diffusers", "torch"):
            _replace_layers(child)


def _fast_layer(module: Any) -> nn.Module | None:
    """What stands in for a layer; None where nothing does. Classes go by their names, so that none is imported here."""
    kind = type(module).__name__
    if kind == "Transformer2DModel" and _is_plain_transformer(module):
        return Transformer(module)
    if kind == "ResnetBlock2D" and _is_plain_resnet(module):
        return Resnet(module)
    if kind == "Upsample2D" and _is_plain_upsample(module):
        return FoldedUpsample(module.conv)
    if type(module) is nn.Linear:
        return PackedLinear(module.weight, module.bias)
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return PackedConv2d(module)
    return None


def _consists_of(module: nn.Module, kinds: set[str]) -> bool:
    return all(type(part).__name__ in kinds for part in module.modules())


def _is_plain_transformer(model: Any) -> bool:
    if not (_consists_of(model, _TRANSFORMER_PARTS) and model.is_input_continuous):
        return False
    blocks = list(model.transformer_blocks)
    attentions = [attn for block in blocks for attn in (block.attn1, block.attn2)]
    return all(block.norm_type == "layer_norm" and not block.only_cross_attention for block in blocks) and all(
        attn is not None
        and attn.is_cross_attention == bool(number % 2)
        and attn.to_q.bias is None
        and attn.norm_cross is None
        and type(attn.processor).__name__ in ("AttnProcessor", "AttnProcessor2_0")
        for number, attn in enumerate(attentions)
    )


def _is_plain_resnet(block: Any) -> bool:
    return (
        _consists_of(block, _RESNET_PARTS)
        and block.time_embedding_norm == "default"
        and block.output_scale_factor == 1
        and not block.skip_time_act
    )


def _is_plain_upsample(layer: Any) -> bool:
    conv = getattr(layer, "conv", None)
    return (
        type(conv) is nn.Conv2d
        and layer.interpolate
        and layer.norm is None
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    )
