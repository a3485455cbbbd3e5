"""Tiny models of every flow family with random weights, made by diffusers' and transformers' own classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
WORDS = 300


def save_tokenizer(folder: Path, length: int) -> None:
    """A byte-level tokenizer that pads, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=length
    )
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def clip_text(projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        eos_token_id=1,
        bos_token_id=2,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(width: int, kind: str = "T5") -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=WORDS, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=False
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def qwen3(kind: str, layers: int) -> Any:
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return getattr(transformers, kind)(config)


def qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
        "rope_theta": 1e6,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=3, vision_end_token_id=4, image_token_id=5
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def vae(channels: int = 16, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **settings,
    )


def video_vae(kind: str) -> Any:
    import diffusers

    width = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return getattr(diffusers, kind)(**width, temperal_downsample=[False, True, True])


def flux2_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    model = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=16
    )
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    return model


def sd3() -> dict[str, Any]:
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    return {
        "transformer": network,
        "vae": vae(),
        "text_encoder": clip_text(True),
        "text_encoder_2": clip_text(True),
        "text_encoder_3": t5(32),
    }


def flux() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return {"transformer": network, "vae": vae(), "text_encoder": clip_text(False), "text_encoder_2": t5(32)}


def qwen_image() -> dict[str, Any]:
    from diffusers import QwenImageTransformer2DModel

    network = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return {"transformer": network, "vae": video_vae("AutoencoderKLQwenImage"), "text_encoder": qwen_vl()}


def z_image() -> dict[str, Any]:
    from diffusers import ZImageTransformer2DModel

    network = ZImageTransformer2DModel(
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 4, 8]
    )
    for name in ("x_pad_token", "cap_pad_token"):
        torch.nn.init.normal_(getattr(network, name))
    return {"transformer": network, "vae": vae(), "text_encoder": qwen3("Qwen3Model", 2)}


def wan() -> dict[str, Any]:
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return {"transformer": network, "vae": video_vae("AutoencoderKLWan"), "text_encoder": t5(16, "UMT5")}


def flux2() -> dict[str, Any]:
    from diffusers import Flux2Transformer2DModel

    network = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
        timestep_guidance_channels=32,
    )
    return {"transformer": network, "vae": flux2_vae(), "text_encoder": qwen3("Qwen3ForCausalLM", 28)}


MODELS: dict[str, tuple[Callable[[], dict[str, Any]], str, dict[str, Any]]] = {
    "sd3": (sd3, "StableDiffusion3Pipeline", {"shift": 3.0}),
    "flux": (flux, "FluxPipeline", {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}),
    "qwen-image": (
        qwen_image,
        "QwenImagePipeline",
        {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02},
    ),
    "z-image": (z_image, "ZImagePipeline", {"shift": 3.0}),
    "wan": (wan, "WanPipeline", {"shift": 3.0}),
    "flux2": (flux2, "Flux2KleinPipeline", {"use_dynamic_shifting": True}),
}
"""Family -> (its networks, diffusers' pipeline, what its scheduler states)."""


def save_model(family: str, folder: Path) -> Path:
    """A diffusers folder of one family, written by diffusers' own pipeline."""
    import diffusers

    torch.manual_seed(0)
    build, kind, stated = MODELS[family]
    parts = build()
    for network in parts.values():
        network.eval()
    _give_weight(parts["transformer"])
    for name in [name for name in parts if name.startswith("text_encoder")]:
        save_tokenizer(folder / "words", 77 if "clip" in type(parts[name]).__name__.lower() else 512)
        from transformers import AutoTokenizer

        parts[name.replace("text_encoder", "tokenizer")] = AutoTokenizer.from_pretrained(folder / "words")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**stated)
    getattr(diffusers, kind)(**parts, scheduler=scheduler).save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == kind
    return folder


def _give_weight(network: torch.nn.Module) -> None:
    """Some classes start with zeros in what ends a block, behind which nothing would be seen."""
    for parameter in network.parameters():
        if parameter.ndim > 1 and float(parameter.detach().abs().max()) == 0:
            torch.nn.init.normal_(parameter, std=0.1)
