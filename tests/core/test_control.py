"""Pictures that guide the painting, against diffusers' own pipelines on tiny random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from lcm_core.cli.main import main
from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from lcm_core.pipeline import Pipeline
from lcm_core.pipeline.sources import MODELS
from tests.core.references import diffusers_pipeline

WIDTHS = (32, 32, 64, 64)
SMALL: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def outlines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "outlines.png"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    return path


def make_controlnet(seed: int, **changes: Any) -> Any:
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "block_out_channels": WIDTHS,
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 128,
        "conditioning_embedding_out_channels": (8, 8, 8, 8),
    }
    network = ControlNetModel(**sizes | changes)
    for name, parameter in network.named_parameters():  # the layers that lead out begin with zeros
        if "controlnet_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def make_adapter(channels: int = 3, **changes: Any) -> Any:
    from diffusers import T2IAdapter

    torch.manual_seed(0)
    return T2IAdapter(channels, list(WIDTHS), num_res_blocks=2, adapter_type="full_adapter", **changes).eval()


def make_folder(path: Path) -> str:
    make_adapter().save_pretrained(path)
    return str(path)


def theirs(kind: str, folder: Path, picture: Any, **parts: Any) -> torch.Tensor:
    """diffusers' picture (1, 3, H, W) in [0, 1]."""
    options = {name: parts.pop(name) for name in list(parts) if name.endswith("_scale")}
    pipe = diffusers_pipeline(kind, folder, **parts)
    options |= {"generator": torch.Generator().manual_seed(3), "output_type": "pt", "guidance_scale": 3.0}
    images = pipe("a red cat", image=picture, height=64, width=64, num_inference_steps=2, **options).images
    return images if isinstance(images, torch.Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)


def test_a_controlnet_differs_from_diffusers(plain: Pipeline, models: Path, outlines: Path, tmp_path: Path) -> None:
    networks = [make_controlnet(seed) for seed in (1, 2)]
    for number, network in enumerate(networks):
        network.save_pretrained(tmp_path / str(number))
    picture = Image.open(outlines)
    for count in (1, 2):
        scales = [0.8, 0.5][:count]
        expected = theirs(
            "StableDiffusionControlNetPipeline",
            models / "plain",
            [picture] * count,
            controlnet=networks[:count],
            controlnet_conditioning_scale=scales,
        )
        control = [(str(tmp_path / str(number)), outlines, scale) for number, scale in enumerate(scales)]
        given = plain("a red cat", seed=3, sampler="lcm", output_type="pt", control=control, **SMALL).images
        assert_close(given, expected, rtol=0, atol=1e-4)
    assert not torch.equal(given, plain("a red cat", seed=3, sampler="lcm", output_type="pt", **SMALL).images)


def test_a_t2i_adapter_differs_from_diffusers(plain: Pipeline, models: Path, outlines: Path, tmp_path: Path) -> None:
    adapter = make_adapter()
    adapter.save_pretrained(tmp_path / "folder")
    save_file(adapter.state_dict(), tmp_path / "file.safetensors")
    expected = theirs(
        "StableDiffusionAdapterPipeline",
        models / "plain",
        Image.open(outlines),
        adapter=adapter,
        adapter_conditioning_scale=0.8,
    )
    for path in ("folder", "file.safetensors"):
        control = [(str(tmp_path / path), outlines, 0.8)]
        given = plain("a red cat", seed=3, sampler="lcm", output_type="pt", control=control, **SMALL).images
        assert_close(given, expected, rtol=0, atol=1e-4)


def test_the_shipped_adapter_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A square of outlines gives another picture than none; the file of the picture makes it again."""
    monkeypatch.chdir(tmp_path)
    outlines = Image.new("L", (64, 64))
    outlines.paste(255, (12, 12, 52, 52))
    outlines.paste(0, (14, 14, 50, 50))
    outlines.save("outlines.png")
    argv = ["generate", "a red apple", "--device", "cpu", "--dtype", "float32", "--steps", "1", "--size", "64x64"]
    assert main([*argv, "--control", "canny=outlines.png:0.9", "--output", "a.png"]) == 0
    assert main([*argv, "--output", "b.png"]) == 0
    assert Image.open("a.png").tobytes() != Image.open("b.png").tobytes()
    assert main(["generate", "--from", "a.png", "--output", "c.png"]) == 0
    assert Path("c.png").read_bytes() == Path("a.png").read_bytes()


def test_an_unfit_control_ends_in_a_traceback(plain: Pipeline, outlines: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="control strength inf is out of range"):
        plain("cat", control=[(make_folder(tmp_path / "adapter"), outlines, float("inf"))], **SMALL)
    shipped = MODELS / "emoji" / "control" / "emoji_canny.safetensors"
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    tensors = read_safetensors(shipped)[0]
    save_file(dict(list(tensors.items())[1:]), tmp_path / "cut.safetensors")
    for path, words in (
        (shipped, "is for a U-Net of widths"),
        (tmp_path / "other.safetensors", "no T2I-Adapter in diffusers' layout"),
        (tmp_path / "cut.safetensors", "lacks 1 weights"),
        (tmp_path / "none", "does not exist"),
        (tmp_path, "config.json|holds no"),
    ):
        with pytest.raises(InputError, match=words):
            plain("cat", control=[(str(path), outlines, 1.0)], **SMALL)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("controlnet", {"in_channels": 9}, "does not go with this model's U-Net"),
        ("controlnet", {"layers_per_block": 2}, "does not go with this model's U-Net"),
        ("controlnet", {"conditioning_channels": 4}, "reads 4 channels of a picture"),
        ("controlnet", {"conditioning_embedding_out_channels": (8, 8)}, "does not go with this model's U-Net"),
        ("controlnet", {"controlnet_conditioning_channel_order": "grb"}, "does not go with this model's U-Net"),
        ("adapter", {"downscale_factor": 4}, "does not go with this model's U-Net"),
        ("stated", {"_class_name": ["ControlNetModel"]}, "the configuration says _class_name"),
        ("stated", {"layers_per_block": 10**9}, "the configuration says layers_per_block"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_control_of_another_kind_fails_while_painting(
    kind: str, change: dict[str, Any], words: str, plain: Pipeline, outlines: Path, tmp_path: Path
) -> None:
    """Of the right widths, but made for another U-Net: torch's own error came with the first step."""
    if kind == "adapter":
        make_adapter(**change).save_pretrained(tmp_path)
    else:
        make_controlnet(1, **({} if kind == "stated" else change)).save_pretrained(tmp_path)
    if kind == "stated":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=words):
        plain.model.control(str(tmp_path))


def test_a_layer_of_a_t2i_adapter_is_a_single_number(plain: Pipeline, tmp_path: Path) -> None:
    tensors = make_adapter().state_dict() | {"adapter.body.0.resnets.0.block2.weight": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"odd\.safetensors"):
        plain.model.control(str(tmp_path / "odd.safetensors"))
