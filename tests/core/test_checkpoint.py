"""Model files in and out: round trips bit for bit, what a file says of itself, one clear line for each broken file."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcm_core.files import architecture, ldm_convert
from lcm_core.files.checkpoint import (
    Component,
    ModelInfo,
    list_components,
    read_component,
    read_info,
    read_safetensors,
    save_diffusers,
    save_single_file,
    write_safetensors,
)
from lcm_core.networks.tokenizer import read_tokenizer_files

FAMILIES = ("sd1", "sd2", "sdxl")
PART_NAMES = {"sd1": 3, "sd2": 3, "sdxl": 4}


def component(module: Any) -> Component:
    config = dict(getattr(module.config, "to_dict", lambda: module.config)())
    tensors = {k: v.clone() for k, v in module.state_dict().items() if not k.endswith("position_ids")}
    if "hidden_act" in config:
        config["architectures"] = [type(module).__name__]
        tensors = ldm_convert.clip_to_diffusers(tensors)
    return Component(tensors, {**config, "_class_name": type(module).__name__})


def tiny_unet(family: str, cond_proj: bool = True) -> nn.Module:
    """The topology of the real one (levels, depths, projections), 32 channels wide."""
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 4}
    if family == "sd2":
        settings |= {"use_linear_projection": True, "attention_head_dim": (2, 4, 4, 4)}
    if family == "sdxl":
        settings = {
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 3),
            "attention_head_dim": (2, 4, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        }
    return UNet2DConditionModel(cross_attention_dim=64, time_cond_proj_dim=16 if cond_proj else None, **settings)


def tiny_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(32, 32, 64, 64), layers_per_block=2, **blocks)


def tiny_text(openclip: bool = False, projected: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=90,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=32,
        hidden_act="gelu" if openclip else "quick_gelu",
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def tiny_model(family: str) -> dict[str, Component]:
    torch.manual_seed(0)
    parts = {"unet": tiny_unet(family), "vae": tiny_vae(), "text_encoder": tiny_text(openclip=family == "sd2")}
    if family == "sdxl":
        parts["text_encoder_2"] = tiny_text(openclip=True, projected=True)
    return {name: component(module) for name, module in parts.items()}


def assert_identical(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for key, value in expected.items():
        assert given[key].dtype == value.dtype, key
        assert torch.equal(given[key], value), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_to_single_file_and_back_keeps_every_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A tensor that is lost, cast, or split and joined in another order would come back different."""
    parts = tiny_model(family)
    for part in parts.values():
        part.tensors = {k: v.to(dtype) for k, v in part.tensors.items()}
    info = ModelInfo(family)  # type: ignore[arg-type]
    save_single_file(tmp_path / "one.safetensors", parts, info)
    names = read_safetensors(tmp_path / "one.safetensors")[0].keys()
    assert "model.diffusion_model.time_embed.cond_proj.weight" in names
    save_diffusers(tmp_path / "folder", {n: read_component(tmp_path / "one.safetensors", n) for n in parts}, info)
    for name, part in parts.items():
        back = read_component(tmp_path / "folder", name)
        assert_identical(back.tensors, part.tensors)
        assert back.config == json.loads(json.dumps(part.config))
    assert read_info(tmp_path / "folder") == read_info(tmp_path / "one.safetensors") == info


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_to_diffusers_and_back_keeps_every_bit(family: str) -> None:
    """Also what only single files have (projection, logit scale, position numbers) must survive there and back."""
    parts = {name: part.tensors for name, part in tiny_model(family).items()}
    if family != "sd1":
        parts["text_encoder" if family == "sd2" else "text_encoder_2"]["logit_scale"] = torch.tensor(4.6)
    if family != "sd2":
        parts["text_encoder"]["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    single = ldm_convert.diffusers_to_ldm(parts, family)
    assert_identical(ldm_convert.diffusers_to_ldm(ldm_convert.ldm_to_diffusers(single), family), single)


@pytest.mark.slow
def test_full_size_sd15_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    """SD 1.5 at its real size (2 GB in half precision), cond_proj included, to a single file and back."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, time_cond_proj_dim=256)
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512, **blocks)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    parts = {"unet": component(unet), "vae": component(vae), "text_encoder": component(text)}
    assert sum(v.numel() for v in parts["unet"].tensors.values()) == 859_520_964 + 256 * 320
    for part in parts.values():
        part.tensors = {key: noise(key, value.shape) for key, value in part.tensors.items()}
    save_single_file(tmp_path / "sd15.safetensors", parts, ModelInfo("sd1"))
    for name, part in parts.items():
        assert_identical(read_component(tmp_path / "sd15.safetensors", name).tensors, part.tensors)
    assert architecture.unet_config(parts["unet"].tensors)["block_out_channels"] == [320, 640, 1280, 1280]


def noise(key: str, shape: torch.Size) -> Tensor:
    """Any bits that make a finite number; fast, and different for each key."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randint(0, 30000, shape, generator=generator, dtype=torch.int16).view(torch.float16)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_agrees_with_diffusers_own_converter(family: str) -> None:
    """An independent reader of the same file must find the same weight under the same name."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    torch.manual_seed(0)
    unet, vae = component(tiny_unet(family, cond_proj=False)), component(tiny_vae())
    single = ldm_convert.diffusers_to_ldm({"unet": unet.tensors, "vae": vae.tensors}, family)
    assert_identical(convert_ldm_unet_checkpoint(dict(single), unet.config), unet.tensors)
    assert_identical(convert_ldm_vae_checkpoint(dict(single), vae.config), vae.tensors)


def test_diffusers_and_transformers_read_what_is_written(tmp_path: Path) -> None:
    """A folder that only this package can read would be no diffusers folder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    parts = tiny_model("sd1")
    save_diffusers(tmp_path, parts, ModelInfo("sd1"))
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert_identical(dict(unet.state_dict()), parts["unet"].tensors)
    vae = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    assert_identical(dict(vae.state_dict()), parts["vae"].tensors)
    text = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    read = {k: v for k, v in text.state_dict().items() if not k.endswith("position_ids")}
    assert_identical(ldm_convert.clip_to_diffusers(read), parts["text_encoder"].tensors)


def test_old_vae_names_and_convolutional_attention_are_read(tmp_path: Path) -> None:
    """VAEs written before 2023 name their attention differently; some converters keep it as convolutions."""
    vae = component(tiny_vae())
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in vae.tensors.items():
        attention = ".attentions.0.to_" in key
        name = key
        for new, former in names.items() if attention else ():
            name = name.replace(new, former)
        old[name] = value[..., None, None] if attention and value.ndim == 2 else value
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in old
    save_diffusers(tmp_path, {"vae": Component(old, vae.config)}, ModelInfo("sd1"))
    assert_identical(read_component(tmp_path, "vae").tensors, vae.tensors)
    write_safetensors(tmp_path / "bare.safetensors", ldm_convert.vae_to_ldm(old))
    assert_identical(read_component(tmp_path / "bare.safetensors", "vae").tensors, vae.tensors)


def test_bare_unet_files_are_read_in_both_layouts(tmp_path: Path) -> None:
    """A U-Net alone, without any prefix, is how trainers and ComfyUI's diffusion_models folder store it."""
    unet = component(tiny_unet("sd1"))
    write_safetensors(tmp_path / "diffusers.safetensors", unet.tensors)
    write_safetensors(tmp_path / "ldm.safetensors", ldm_convert.unet_to_ldm(unet.tensors))
    for name in ("diffusers", "ldm"):
        assert list_components(tmp_path / f"{name}.safetensors") == ["unet"]
        read = read_component(tmp_path / f"{name}.safetensors", "unet")
        assert_identical(read.tensors, unet.tensors)
        assert read.config["time_cond_proj_dim"] == 16


def test_shards_and_half_precision_variants_are_read(tmp_path: Path) -> None:
    """diffusers splits large networks over files, and publishes half precision under another name."""
    unet = component(tiny_unet("sd1"))
    keys = sorted(unet.tensors)
    weight_map = {}
    for number, part in enumerate((keys[::2], keys[1::2])):
        name = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        write_safetensors(tmp_path / "unet" / name, {key: unet.tensors[key] for key in part})
        weight_map |= dict.fromkeys(part, name)
    (tmp_path / "unet" / "config.json").write_text(json.dumps(unet.config))
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_identical(read_component(tmp_path, "unet").tensors, unet.tensors)
    index.unlink()
    half = {k: v.half() for k, v in unet.tensors.items()}
    write_safetensors(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors", half)
    assert_identical(read_component(tmp_path, "unet").tensors, half)


def test_metadata_says_what_shapes_cannot(tmp_path: Path) -> None:
    """Without it a small model would get SD 1.x's 8 heads and paint noise."""
    parts = {"unet": component(tiny_unet("sd1"))}
    files = {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\n"}
    save_single_file(tmp_path / "one.safetensors", parts, ModelInfo("sd1"), files, {"note": "kept"})
    assert read_component(tmp_path / "one.safetensors", "unet").config["attention_head_dim"] == 4
    assert read_tokenizer_files(tmp_path / "one.safetensors") == files
    tensors, metadata = read_safetensors(tmp_path / "one.safetensors")
    assert metadata["note"] == "kept"
    write_safetensors(tmp_path / "bare.safetensors", tensors)
    assert read_component(tmp_path / "bare.safetensors", "unet").config["attention_head_dim"] == 8
    assert read_tokenizer_files(tmp_path / "bare.safetensors") == {}
