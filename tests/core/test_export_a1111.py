"""`export --to a1111|forge`: what is put into a web UI's folders. That the hosts read it, tests/hosts/a1111 shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lcm_core.cli.main import main
from lcm_core.errors import InputError
from lcm_core.export import a1111
from lcm_core.export.webui import webui_yaml
from lcm_core.files.checkpoint import Component, ModelInfo, read_info
from lcm_core.pipeline import Pipeline


@pytest.fixture
def hosts(tmp_path: Path) -> dict[str, Path]:
    """Folders with what the two hosts are known by."""
    found = {name: tmp_path / name for name in ("a1111", "forge")}
    for folder in found.values():
        (folder / "modules").mkdir(parents=True)
        (folder / "modules" / "sd_models.py").touch()
    (found["forge"] / "modules_forge").mkdir()
    return found


def with_prediction(models: Path, folder: Path, prediction_type: str) -> Path:
    """The tiny model in the embedded one's layout, with another card."""
    folder.mkdir()
    for part in (models / "emoji").iterdir():
        if part.name != "model.json":
            (folder / part.name).symlink_to(part)
    card = json.loads((models / "emoji" / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(card | {"prediction_type": prediction_type}))
    return folder


@pytest.mark.parametrize(("prediction_type", "word"), [("epsilon", "eps"), ("v_prediction", "v")])
def test_both_networks_and_the_lora_arrive_with_what_the_host_must_be_told(
    models: Path, tmp_path: Path, hosts: dict[str, Path], prediction_type: str, word: str
) -> None:
    model = with_prediction(models, tmp_path / "tiny", prediction_type)
    assert main(["export", "--to", "a1111", "--path", str(hosts["a1111"]), "--model", str(model)]) == 0
    checkpoints = hosts["a1111"] / "models" / "Stable-diffusion"
    for name in ("tiny_lcm", "tiny_teacher"):
        told = yaml.safe_load((checkpoints / f"{name}.yaml").read_text())["model"]["params"]
        assert told["parameterization"] == word
        text = Path(told["cond_stage_config"]["params"]["version"])
        assert text.is_absolute()  # whatever folder the web UI is started from
        assert {"vocab.json", "merges.txt", "config.json"} <= {file.name for file in text.iterdir()}
        assert read_info(checkpoints / f"{name}.safetensors").prediction_type == prediction_type
    guidance = "model.diffusion_model.time_embed.cond_proj.weight"
    assert guidance in load_file(checkpoints / "tiny_lcm.safetensors")
    assert guidance not in load_file(checkpoints / "tiny_teacher.safetensors")
    original, arrived = (
        model / "lora" / "lcm_lora.safetensors",
        hosts["a1111"] / "models/Lora/tiny_lcm_lora.safetensors",
    )
    torch.testing.assert_close(load_file(arrived), load_file(original), rtol=0, atol=0)


def test_the_description_has_the_sizes_of_the_network(models: Path, hosts: dict[str, Path]) -> None:
    """A wrong size makes the host drop weights, a wrong number of heads makes another picture without a word."""
    options = ["--model", str(models / "emoji"), "--unet", "lcm"]
    assert main(["export", "--to", "a1111", "--path", str(hosts["a1111"]), *options]) == 0
    file = hosts["a1111"] / "models" / "Stable-diffusion" / "emoji_lcm.yaml"
    told = yaml.safe_load(file.read_text())["model"]["params"]
    unet, vae = told["unet_config"]["params"], told["first_stage_config"]["params"]["ddconfig"]
    expected = {"model_channels": 32, "channel_mult": [1, 1, 2, 2], "num_res_blocks": 1, "num_heads": 2}
    expected |= {"attention_resolutions": [1, 2, 4], "context_dim": 128}
    assert {key: unet[key] for key in expected} == expected
    assert (vae["ch"], vae["ch_mult"], vae["num_res_blocks"], vae["z_channels"]) == (32, [1, 1, 1, 1], 1, 4)
    assert told["scale_factor"] == 0.18215
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "emoji_lcm.config",
        "emoji_lcm.safetensors",
        "emoji_lcm.yaml",
    ]


def test_forge_gets_a_folder_of_configurations_without_weights(models: Path, hosts: dict[str, Path]) -> None:
    assert main(["export", "--to", "forge", "--path", str(hosts["forge"]), "--model", str(models / "emoji")]) == 0
    folder = hosts["forge"] / "models" / "Stable-diffusion" / "emoji_lcm.config"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    for name in ("unet", "vae", "text_encoder"):
        assert json.loads((folder / name / "config.json").read_text())
    assert not list(folder.rglob("*.safetensors"))


def test_what_arrived_paints_the_same_picture(models: Path, hosts: dict[str, Path]) -> None:
    assert main(["export", "--to", "a1111", "--path", str(hosts["a1111"]), "--model", str(models / "emoji")]) == 0
    file = hosts["a1111"] / "models" / "Stable-diffusion" / "emoji_lcm.safetensors"
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 64, "height": 64}
    own, arrived = (Pipeline.load(path, device="cpu", dtype="float32") for path in (models / "emoji", file))
    pictures = [np.asarray(pipe("a pizza", **settings).images[0]).astype(int) for pipe in (own, arrived)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # weights that lie otherwise in memory are rounded otherwise


def test_an_export_is_replaced_and_a_stranger_s_file_is_not(
    models: Path, hosts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", "--to", "a1111", "--path", str(hosts["a1111"]), "--model", str(models / "emoji")]
    assert main(argv) == 0
    assert main(argv) == 0
    file = hosts["a1111"] / "models" / "Stable-diffusion" / "emoji_lcm.safetensors"
    save_file({"theirs": torch.zeros(1)}, file)
    assert main(argv) == 2
    assert "is no export of LCM Suite; move or rename it first" in capsys.readouterr().err
    with safe_open(file, "pt") as kept:
        assert list(kept.keys()) == ["theirs"]


@pytest.mark.parametrize(
    ("to", "folder", "message"),
    [
        ("a1111", "forge", "is Forge; use --to forge"),
        ("forge", "a1111", "is AUTOMATIC1111's web UI; use --to a1111"),
        ("a1111", "", "is no web UI"),
    ],
)
def test_another_folder_is_refused_before_anything_is_written(
    hosts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, folder: str, message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", "--to", to, "--path", str(tmp_path / folder)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def components(width: int = 320, context: int = 768, **unet: object) -> dict[str, Component]:
    """Configurations alone."""
    sizes = {"block_out_channels": [width, 2 * width, 4 * width, 4 * width], "cross_attention_dim": context}
    kinds = {"down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "attention_head_dim": 8}
    rest = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2}
    vae = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "in_channels": 3, "out_channels": 3}
    return {
        "unet": Component({}, sizes | kinds | rest | unet),
        "vae": Component({}, vae | {"layers_per_block": 2, "_class_name": "AutoencoderKL"}),
        "text_encoder": Component({}, {}),
    }


def test_what_the_hosts_cannot_build_is_refused_with_the_reason(hosts: dict[str, Path]) -> None:
    small = components(32, 64)
    with pytest.raises(InputError, match="sd2 model of its own size"):
        a1111.export_checkpoint(hosts["a1111"], "x", small, ModelInfo("sd2"))
    with pytest.raises(InputError, match="would take for epsilon"):
        a1111.export_checkpoint(hosts["a1111"], "x", components(), ModelInfo("sdxl", "v_prediction"))
    with pytest.raises(InputError, match="prediction type sample"):
        webui_yaml(components(), replace(ModelInfo("sd1"), prediction_type="sample"))
    with pytest.raises(InputError, match="attention heads"):
        webui_yaml(components(attention_head_dim=[5, 10, 20, 21]), ModelInfo("sd2"))
    assert not (hosts["a1111"] / "models").exists()


def test_usual_sizes_are_described_in_the_hosts_own_words() -> None:
    """SD 1.5 and SD 2.1 with v-prediction, as in v1-inference.yaml and v2-inference-v.yaml of the host."""
    one = yaml.safe_load(webui_yaml(components(), ModelInfo("sd1")))["model"]["params"]
    assert one["cond_stage_config"]["params"]["version"] == "openai/clip-vit-large-patch14"
    assert one["unet_config"]["params"]["num_heads"] == 8
    two = components(context=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
    told = yaml.safe_load(webui_yaml(two, ModelInfo("sd2", "v_prediction")))["model"]["params"]
    assert told["parameterization"] == "v"
    assert told["unet_config"]["params"]["num_head_channels"] == 64
    assert told["unet_config"]["params"]["use_linear_in_transformer"] is True
    assert told["cond_stage_config"] == {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"freeze": True, "layer": "penultimate"},
    }
