"""IP-Adapters against diffusers' own `load_ip_adapter` on tiny random weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from lcm_core.errors import InputError
from lcm_core.networks.cpu.optimise import optimise_unet
from lcm_core.networks.cpu.packed import can_pack
from lcm_core.networks.cross_attention import Attended, attending
from lcm_core.networks.unet import UNet
from lcm_core.pipeline import Pipeline
from tests.core.references import diffusers_pipeline

TEXT, SEEN, HIDDEN = 128, 24, 32  # width of the U-Net's text; of what CLIP gives; of its layers
SMALL: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64}


def make_encoder(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=SEEN)
    CLIPVisionModelWithProjection(config).eval().save_pretrained(folder)


def random(*shape: int) -> Tensor:
    return torch.randn(shape) / shape[-1] ** 0.5


def projection(is_plus: bool) -> dict[str, Tensor]:
    """By the names of the files that people have."""
    norm = {"weight": torch.rand(TEXT) + 0.5, "bias": random(TEXT)}
    if not is_plus:
        tensors = {"proj.weight": random(4 * TEXT, SEEN), "proj.bias": random(4 * TEXT)}
        return tensors | {f"norm.{name}": value for name, value in norm.items()}
    tensors = {"latents": random(1, 6, 64), "proj_in.weight": random(64, HIDDEN), "proj_in.bias": random(64)}
    tensors |= {"proj_out.weight": random(TEXT, 64), "proj_out.bias": random(TEXT)}
    tensors |= {f"norm_out.{name}": value for name, value in norm.items()}
    for layer in range(4):
        matrices = {"0.to_q": (64, 64), "0.to_kv": (128, 64), "0.to_out": (64, 64), "1.1": (256, 64), "1.3": (64, 256)}
        tensors |= {f"layers.{layer}.{name}.weight": random(*shape) for name, shape in matrices.items()}
        for name in ("0.norm1", "0.norm2", "1.0"):
            tensors |= {
                f"layers.{layer}.{name}.weight": torch.rand(64) + 0.5,
                f"layers.{layer}.{name}.bias": random(64),
            }
    return tensors


def make_adapter(path: Path, unet: Any, is_plus: bool = False, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    tensors = {f"image_proj.{name}": value for name, value in projection(is_plus).items()}
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    for number, layer in enumerate(layers):
        for kind in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * number + 1}.{kind}.weight"] = random(*layer.to_k.weight.shape)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, plain: Pipeline) -> Path:
    """As people keep them: the adapters, and beside them the image encoder."""
    root = tmp_path_factory.mktemp("adapters")
    make_encoder(root / "image_encoder")
    make_adapter(root / "plain.safetensors", plain.model.unet.model)
    make_adapter(root / "plus.safetensors", plain.model.unet.model, is_plus=True, seed=2)
    grey = 128 + 90 * torch.randn(61, 90, generator=torch.Generator().manual_seed(2))  # Image.effect_noise has no seed
    Image.fromarray(grey.clamp(0, 255).byte().numpy()).convert("RGB").save(root / "photo.png")
    return root


@pytest.mark.parametrize("names", [["plain"], ["plus"], ["plain", "plus"]])
def test_the_picture_differs_from_diffusers(plain: Pipeline, models: Path, folder: Path, names: list[str]) -> None:
    from transformers import CLIPImageProcessor

    pipe = diffusers_pipeline(
        "StableDiffusionPipeline", models / "plain", feature_extractor=CLIPImageProcessor(size=32, crop_size=32)
    )
    files = [f"{name}.safetensors" for name in names]
    pipe.load_ip_adapter(folder, [""] * len(files), files, "image_encoder", local_files_only=True)
    scales = [0.8, -0.4][: len(files)]
    pipe.set_ip_adapter_scale(scales)
    photo = Image.open(folder / "photo.png")
    for guidance in (1.0, 3.0):
        expected = pipe(
            "a red cat",
            ip_adapter_image=[photo] * len(files),
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(3),
            output_type="np",
        ).images
        control = [(str(folder / file), folder / "photo.png", scale) for file, scale in zip(files, scales, strict=True)]
        options: dict[str, Any] = {
            "seed": 3,
            "sampler": "lcm",
            "output_type": "np",
            "guidance_scale": guidance,
            **SMALL,
        }
        given = plain("a red cat", control=control, **options).images
        # The adapter moves the picture by .08 to .35. From diffusers' it is up to 3e-4 off, more or less with another
        # photo or processor: these random weights enlarge rounding.
        assert abs(given - plain("a red cat", **options).images).max() > 5e-2
        assert_close(given, expected, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.skipif(not can_pack(torch.float32), reason="needs a processor with AVX2")
def test_packed_layers_see_another_picture(plain: Pipeline, folder: Path) -> None:
    adapter = plain.model.control(str(folder / "plain.safetensors"))
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "x": torch.randn(2, 4, 8, 8),
        "t": torch.tensor([700.0, 30.0]),
        "encoder_hidden_states": torch.randn(2, 77, TEXT),
        "picture_tokens": {"0": torch.randn(2, 4, TEXT)},
    }
    unet, attended = copy.deepcopy(plain.model.unet.model), Attended(pictures=[(adapter.keys, 0.7)])
    expected = attending(UNet(unet), attended)(**given)
    fast = optimise_unet(unet.to(memory_format=torch.channels_last))
    assert_close(attending(UNet(fast), attended)(**given), expected, rtol=1e-4, atol=1e-4)


def test_it_does_not_go_with_the_others(plain: Pipeline, folder: Path) -> None:
    """Prompts that change, AND, batches, a negative prompt by attention: the picture counts in each."""
    control = [(str(folder / "plain.safetensors"), folder / "photo.png", 1.0)]
    options: dict[str, Any] = {"output_type": "latent", "sampler": "lcm", **SMALL}
    for words, more in (
        ("[cat:dog:1]", {"guidance_scale": 2.0}),
        ("cat AND dog", {"guidance_scale": 1.0}),
        ("cat", {"guidance_scale": 1.0, "nag_scale": 3.0, "negative_prompt": "dog"}),
    ):
        seen = plain(words, seed=[1, 2], control=control, **options, **more).images
        effect = (seen - plain(words, seed=[1, 2], **options, **more).images).abs().max()
        assert effect > 1
        at_once = plain(words, seed=[1, 2], control=control, batch_size=2, **options, **more).images
        # Random weights make float32's rounding large: of latents of up to 53, .0016 here, and .09 with another photo.
        assert_close(at_once, seen, rtol=0, atol=float(effect) / 100)


def test_an_unfit_file_ends_in_a_traceback(plain: Pipeline, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "plain.safetensors")
    make_encoder(tmp_path / "image_encoder")
    changes: dict[str, dict[str, Tensor | None]] = {
        "is no IP-Adapter of the plain or the plus kind": {"ip_adapter.1.to_k_ip.weight": None},
        "keys and values of different shapes": {"ip_adapter.1.to_k_ip.weight": torch.zeros(3, 3)},
        "is for a U-Net with 10 layers that read text, the first of shape": {
            f"ip_adapter.1.to_{kind}_ip.weight": torch.zeros(3, 3) for kind in "kv"
        },
        "is NaN or infinite": {"ip_adapter.3.to_v_ip.weight": torch.full((32, TEXT), float("nan"))},
        "lacks 1 weights": {"image_proj.norm.weight": None},
        "reads 7 numbers of CLIP": {"image_proj.proj.weight": torch.zeros(4 * TEXT, 7)},
        "plus kind; give one of these": {"image_proj.latents": torch.zeros(3)},
        "is stored as int8; a quantised model": {
            "ip_adapter.1.to_v_ip.weight": tensors["ip_adapter.1.to_v_ip.weight"].to(torch.int8)
        },
    }
    for number, (words, change) in enumerate(changes.items()):
        path = tmp_path / f"{number}.safetensors"
        save_file({key: value for key, value in (tensors | change).items() if value is not None}, path)
        with pytest.raises(InputError, match=words):
            plain("cat", control=[(str(path), folder / "photo.png", 1.0)], **SMALL)
    plus = load_file(folder / "plus.safetensors")
    save_file(plus | {"image_proj.layers.0.0.to_kv.weight": torch.zeros(1, 64)}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="plus kind; give one of these"):
        plain("cat", control=[(str(tmp_path / "odd.safetensors"), folder / "photo.png", 1.0)], **SMALL)
    save_file(tensors, tmp_path / "good.safetensors")
    config = json.loads((tmp_path / "image_encoder" / "config.json").read_text())
    for change in ({"num_hidden_layers": 10**9}, {"image_size": 10**6}, {"hidden_size": "32"}):  # would take for ever
        (tmp_path / "image_encoder" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=r"image_encoder.config\.json: the configuration says"):
            plain("cat", control=[(str(tmp_path / "good.safetensors"), folder / "photo.png", 1.0)], **SMALL)
    alone = make_adapter(tmp_path / "deep" / "er.safetensors", plain.model.unet.model)
    alone.rename(tmp_path.parent / "alone.safetensors")
    with pytest.raises(InputError, match="needs the image encoder that it was trained with"):
        plain("cat", control=[(str(tmp_path.parent / "alone.safetensors"), folder / "photo.png", 1.0)], **SMALL)
