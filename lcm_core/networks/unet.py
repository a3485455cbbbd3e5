"""The U-Net: loading it for the machine at hand, and calling it in one way whatever its number format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcm_core.diffusion.flow_map import END_KEY, end_embedding
from lcm_core.errors import InputError
from lcm_core.files.checkpoint import Component, ModelPath, read_component
from lcm_core.networks.device import Device, assemble, choose_device, choose_dtype, choose_memory_format

__all__ = [
    "UNet",
    "choose_device",
    "choose_dtype",
    "choose_memory_format",
    "exact_output",
    "load_unet",
    "set_attention",
]


class UNet:
    """A diffusers U-Net as `unet(x, t, **conditioning) -> Tensor`; casts what goes in and what comes out.

    Attributes:
        model: the UNet2DConditionModel.
        forward: calls it; see `networks.traced`.
        guidance_embedding_dim: width of the guidance embedding that a full LCM takes as `timestep_cond`; else None.
        end_embedding_dim: width of the embedding of a jump's end, which follows it in a flow map; else 0.
    """

    reads_guidance = False
    """Whether guidance is an input as it is; see `families.network.Transformer`."""

    def __init__(self, model: Any) -> None:
        parameter = next(model.parameters())
        self.model = model
        self.forward: Callable[..., Any] = model
        self.device, self.dtype = parameter.device, parameter.dtype
        self.end_embedding_dim: int = model.config.get(END_KEY) or 0
        width = model.config.time_cond_proj_dim
        self.guidance_embedding_dim: int | None = None if width is None else width - self.end_embedding_dim
        self.in_channels: int = model.config.in_channels

    @property
    def multiple(self) -> int:
        """Latent pixels that the sides of its input must be multiples of."""
        return int(2 ** (len(self.model.config.block_out_channels) - 1))

    @property
    def sample_size(self) -> int | None:
        """Latent pixels along each side that it was trained at; a configuration may give two sides, or none."""
        size: Any = self.model.config.sample_size
        return size if size is None or isinstance(size, int) else max(size)

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        residuals: Mapping[str, Sequence[Tensor]] | None = None,
        end: Tensor | None = None,
    ) -> Tensor:
        """Predict noise, velocity or image, as the network was trained to.

        Args:
            x: (B, C, H, W) noisy latents in the network's own (variance preserving) scale.
            t: (B,) timesteps, fractions allowed.
            encoder_hidden_states: (B, 77, D) text.
            timestep_cond: (B, guidance_embedding_dim) guidance embedding of a full LCM.
            added_cond_kwargs: SDXL's `text_embeds` (B, P) and `time_ids` (B, 6).
            residuals: what is added inside, see `networks.control`.
            end: (B,) where the jump ends, as a share of the training timesteps; for a flow map only.

        Returns:
            (B, C, H, W) in the dtype of `x`.
        """
        if self.end_embedding_dim:
            if end is None or timestep_cond is None:
                raise InputError("this model is a flow map: it has to be told where a jump ends; use the sampler tcd")
            timestep_cond = torch.cat([timestep_cond, end_embedding(end, self.end_embedding_dim)], dim=1)
        added = None if added_cond_kwargs is None else {k: self._cast(v) for k, v in added_cond_kwargs.items()}
        if added is not None and added_cond_kwargs is not None and "time_ids" in added:
            added["time_ids"] = added_cond_kwargs["time_ids"].to(self.device)  # pixel counts do not survive bfloat16
        output = self.forward(
            self._cast(x),
            t.to(self.device),
            None if encoder_hidden_states is None else self._cast(encoder_hidden_states),
            timestep_cond=None if timestep_cond is None else self._cast(timestep_cond),
            added_cond_kwargs=added,
            return_dict=False,
            **self._added(residuals or {}),
        )[0]
        return output.to(x.device, x.dtype)

    def _added(self, residuals: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        """What is added, by diffusers' names; it has one tensor for the middle, and takes the others out of their
        list."""
        lists = {name: [self._cast(tensor) for tensor in tensors] for name, tensors in residuals.items()}
        return {name: tensors[0] if name.startswith("mid_") else tensors for name, tensors in lists.items()}

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)


def load_unet(
    source: ModelPath | Component,
    device: Device | None = None,
    dtype: str | torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    attention: Literal["sdpa", "bmm"] = "sdpa",
) -> Any:
    """Load a UNet2DConditionModel, frozen and in evaluation mode.

    Args:
        source: what `checkpoint.read_component` reads, or what it returns.
        device, dtype, memory_format: None chooses for this machine.
        attention: see `set_attention`.

    Raises:
        InputError: no usable U-Net there.
    """
    from diffusers import UNet2DConditionModel

    component = source if isinstance(source, Component) else read_component(source, "unet")
    kind = component.config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise InputError(f"{component.source} holds a {kind}, not a U-Net; give a model of Stable Diffusion's kind")
    if component.config.get("num_class_embeds") is not None:
        raise InputError(
            f"{component.source} reads class labels beside text (num_class_embeds), which is not supported; give a "
            "text-to-image model, or a class-conditional one without text encoders"
        )
    if (first := component.tensors.get("conv_in.weight")) is not None and first.ndim == 4 and first.shape[1] == 9:
        raise InputError(
            f"{component.source} is an inpainting U-Net, which takes the mask and the picture in 5 channels more; "
            "give the text-to-image model that it was made from: a mask works with any"
        )
    place = choose_device(device)
    model = assemble(
        lambda: _build(UNet2DConditionModel, component.config),
        component,
        place,
        choose_dtype(place, dtype, sum(tensor.numel() for tensor in component.tensors.values())),
        choose_memory_format(place, memory_format),
    )
    set_attention(model, attention)
    if next(model.parameters()).dtype != torch.float32:
        exact_output(model)
    return model


def _build(kind: Any, config: Mapping[str, Any]) -> Any:
    """diffusers' class does not know of a jump's end, and would warn."""
    model = kind.from_config({key: value for key, value in config.items() if key != END_KEY})
    if END_KEY in config:
        model.register_to_config(**{END_KEY: config[END_KEY]})
    return model


class _ExactConv(nn.Conv2d):
    """A convolution in float32, whatever comes in and whatever autocast says."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def exact_output(model: Any) -> None:
    """Let a U-Net's last layer compute in float32, so that its output is not rounded to the network's own format.

    x0 = (x - sqrt(1 - abar) eps) / sqrt(abar) multiplies an error of eps by 14.6 at Stable Diffusion's last timestep:
    bfloat16's rounding alone would put noise of 6 % on a one-step picture, and on every target of a distillation.
    """
    plain = model.conv_out
    exact = _ExactConv(plain.in_channels, plain.out_channels, plain.kernel_size, plain.stride, plain.padding)
    exact = exact.to(plain.weight.device)
    exact.load_state_dict(plain.state_dict())
    model.conv_out = exact.requires_grad_(plain.weight.requires_grad)


def set_attention(model: Any, kind: Literal["sdpa", "bmm"]) -> None:
    """Choose how a U-Net or AutoencoderKL computes attention.

    Args:
        model: the network.
        kind: "sdpa", torch's fused kernel: least memory, and fastest on GPUs and on large pictures. "bmm", two plain
            matrix products: on a CPU with small pictures its backward pass is several times faster.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    if kind not in ("sdpa", "bmm"):
        raise InputError(f"unknown attention '{kind}'; use 'sdpa' or 'bmm'")
    model.set_attn_processor(AttnProcessor2_0() if kind == "sdpa" else AttnProcessor())
