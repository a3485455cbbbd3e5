"""The embedded model for ComfyUI's own nodes: loaders, text encoding, samplers, LoRA, saving and training.

ComfyUI knows a network by its sizes. This adds the embedded model's to its list, with the text encoder and tokenizer
that go with them, so that a file written by `python -m lcm_core export --to comfyui` is a checkpoint like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from comfy import clip_model, model_base, sd1_clip, supported_models, supported_models_base
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import ModelType
from torch import Tensor

from lcm_core.diffusion.as_flow import as_flow
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.files.checkpoint import AS_FLOW
from lcm_core.files.safetensors import read_json
from lcm_core.pipeline.sources import CARD, MODELS

from .guidance import Guidance, settle_guidance
from .native_vae import as_taesd, is_own

FOLDER = MODELS / "emoji"
_CARD = read_json(FOLDER / CARD)
_UNET = read_json(FOLDER / "unet_lcm" / "config.json")
_TEXT = read_json(FOLDER / "text_encoder" / "config.json")
_DIFFUSION = Diffusion(prediction_type="v_prediction")
_COND_PROJ = "time_embed.cond_proj.weight"


class EmojiWords(sd1_clip.SDTokenizer):
    """CLIP's tokenizer with the model's own vocabulary."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Mapping[str, Any] | None = None) -> None:
        super().__init__(
            tokenizer_path=str(FOLDER / "tokenizer"),
            max_length=_TEXT["max_position_embeddings"],
            embedding_directory=embedding_directory,
            embedding_size=_TEXT["hidden_size"],
            tokenizer_data=tokenizer_data or {},
        )


class EmojiTokenizer(sd1_clip.SD1Tokenizer):
    """`EmojiWords` where ComfyUI expects the tokenizer of SD 1.x."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Mapping[str, Any] | None = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=EmojiWords)


class EmojiTextModel(clip_model.CLIPTextModel):
    """CLIP's text model for another number of words than the 49,408 that ComfyUI assumes."""

    def __init__(self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(config_dict, dtype, device, operations)
        words, width = config_dict["vocab_size"], config_dict["hidden_size"]
        self.set_input_embeddings(operations.Embedding(words, width, dtype=dtype, device=device))


class EmojiEncoder(sd1_clip.SDClipModel):
    """The text model with its special tokens."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Mapping[str, Any] | None = None) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=_TEXT["max_position_embeddings"],
            textmodel_json_config=dict(_TEXT),
            model_class=EmojiTextModel,
            special_tokens={"start": _TEXT["bos_token_id"], "end": _TEXT["eos_token_id"], "pad": _TEXT["pad_token_id"]},
            return_projected_pooled=False,
            model_options=dict(model_options or {}),
        )


class EmojiText(sd1_clip.SD1ClipModel):
    """`EmojiEncoder` where ComfyUI expects the text encoder of SD 1.x."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Mapping[str, Any] | None = None) -> None:
        super().__init__(device, dtype, dict(model_options or {}), clip_model=EmojiEncoder)


class FlowUNet(UNetModel):
    """The embedded model's U-Net, which predicts v, asked as a flow model: for eps - x0 at s = timesteps / 1000."""

    def forward(self, x: Tensor, timesteps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output, of the shape of x; see `lcm_core.diffusion.as_flow`."""
        flow = as_flow(super().forward, _DIFFUSION)
        return flow(x, timesteps / 1000, *args, **kwargs)


class Emoji(supported_models.SD15):
    """The embedded model: SD 1.x with fewer channels; in a file with the mark `AS_FLOW` it is a flow model."""

    is_flow = False
    unet_config = {  # noqa: RUF012  # how a file is recognised
        "model_channels": _UNET["block_out_channels"][0],
        "context_dim": _UNET["cross_attention_dim"],
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
    }
    # diffusers' name is a mistake that stuck: for SD 1.x it is the number of heads
    unet_extra_config = {"num_heads": _UNET["attention_head_dim"], "num_head_channels": -1}  # noqa: RUF012

    def model_type(self, state_dict: Mapping[str, Any], prefix: str = "") -> ModelType:
        """SD 1.x always predicts noise; this model does as its file says."""
        if AS_FLOW in state_dict:
            return ModelType.FLOW
        return ModelType.V_PREDICTION if "v_pred" in state_dict else ModelType.EPS

    def get_model(self, state_dict: Mapping[str, Any], prefix: str = "", device: Any = None) -> Any:
        """The host's model, with the network that its kind needs."""
        kind = self.model_type(state_dict, prefix)
        network = FlowUNet if kind == ModelType.FLOW else UNetModel
        model = model_base.BaseModel(self, model_type=kind, device=device, unet_model=network)
        self.is_flow = kind == ModelType.FLOW
        return model

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights to be saved, with the mark of a flow model."""
        state: dict[str, Tensor] = super().process_unet_state_dict_for_saving(state_dict)
        return {**state, AS_FLOW: torch.tensor([])} if self.is_flow else state

    def process_unet_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Settle a full LCM's guidance at the model's default, since ComfyUI has no `cond_proj`.

        A loader that keeps guidance free takes `cond_proj` out of the file before ComfyUI sees it.
        """
        projection = state_dict.pop(_COND_PROJ, None)
        if projection is not None:
            scale = float(_CARD["guidance_scale"])
            guidance = Guidance(projection.float(), state_dict["time_embed.0.weight"].float().clone(), scale)
            shift = guidance.shift_for(scale)
            settle_guidance(self, replace(guidance, shift=shift))
            state_dict["time_embed.0.bias"] = state_dict["time_embed.0.bias"].float() + shift
        return state_dict

    def process_vae_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tiny VAE, which the host's loader can build, in the place of the embedded model's own."""
        return as_taesd() if is_own(state_dict) else state_dict

    def clip_target(self, state_dict: Mapping[str, Any] | None = None) -> supported_models_base.ClipTarget:
        """Tokenizer and text encoder."""
        return supported_models_base.ClipTarget(EmojiTokenizer, EmojiText)


def register() -> None:
    """Add the embedded model to those that ComfyUI recognises. Once is enough; more does no harm."""
    if Emoji not in supported_models.models:
        supported_models.models.append(Emoji)
