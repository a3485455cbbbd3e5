"""Models from outside: what their files say of themselves is checked before anything is built from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import CONFIG_KEY, TOKENIZER_KEY, read_component, read_info, save_single_file
from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks.text_encoder import load_text
from lcm_core.networks.unet import load_unet
from lcm_core.networks.vae import load_vae
from lcm_core.pipeline.model import diffusion_of, load_model
from lcm_core.pipeline.options import parse_options
from lcm_core.pipeline.sources import find_model, find_source
from tests.core.test_untrusted import changed, copied, whole


@pytest.mark.parametrize(
    "values",
    [
        *({"norm_num_groups": 0}, {"latent_channels": "4"}, {"scaling_factor": 0}, {"scaling_factor": "x"}),
        *({"act_fn": 3}, {"latents_std": [1.0, 0.0, 1.0, 1.0]}, {"latents_mean": "x"}, {"temperal_downsample": 3}),
    ],
    ids=str,
)
def test_vae_with_a_configuration_that_makes_no_sense(values: dict[str, Any], models: Path, tmp_path: Path) -> None:
    folder = changed(copied(models, "plain", "vae", tmp_path), **values)
    with pytest.raises(InputError, match=str(folder)):
        load_vae(tmp_path, "cpu")


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "128"},
        {"vocab_size": -5},
        {"num_hidden_layers": 10**9},
        {"hidden_act": "none"},
        {"max_position_embeddings": None},
        {"architectures": 3},
        {"architectures": []},
        {"architectures": [["CLIPTextModel"]]},
    ],
    ids=str,
)
def test_text_encoder_with_a_configuration_that_makes_no_sense(
    values: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    copied(models, "plain", "tokenizer", tmp_path)
    folder = changed(copied(models, "plain", "text_encoder", tmp_path), **values)
    with pytest.raises(InputError, match=str(folder)):
        load_text(tmp_path, "cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_quantised_weights_are_taken_for_the_weights(dtype: torch.dtype, models: Path, tmp_path: Path) -> None:
    folder = copied(models, "plain", "unet", tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"].to(dtype)}, file)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=f"weight 'conv_in.bias' is stored as {name}; a quantised model"):
        load_unet(tmp_path, "cpu")


def test_inpainting_unet_gets_the_wrong_reason(models: Path, tmp_path: Path) -> None:
    folder = changed(copied(models, "plain", "unet", tmp_path), in_channels=9)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"conv_in.weight": torch.zeros(32, 9, 3, 3)}, file)
    with pytest.raises(InputError, match=r"is an inpainting U-Net.* give the text-to-image model"):
        load_unet(tmp_path, "cpu")


def test_words_that_the_text_encoder_does_not_have(models: Path, tmp_path: Path) -> None:
    copied(models, "plain", "text_encoder", tmp_path)
    folder = copied(models, "plain", "tokenizer", tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {word: number + 500 for word, number in content["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    with pytest.raises(InputError, match=r"knows word \d+, the text encoder only \d+ words; give the tokenizer"):
        load_text(tmp_path, "cpu").encode(["a cat"])


def test_flipped_bit_of_a_model_is_painted_with(models: Path, tmp_path: Path) -> None:
    file = whole(models, tmp_path / "model.safetensors")
    data = bytearray(file.read_bytes())
    data[-5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        load_model(file, "cpu")


def test_file_without_vae_or_words_is_refused_after_loading(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong when the U-Net was loaded before: with a large one that takes ten seconds and more."""
    monkeypatch.setattr("lcm_core.pipeline.parts.load_unet", lambda *_: pytest.fail("the U-Net was loaded first"))
    source = find_source(models / "plain")
    parts = {name: read_component(models / "plain", name) for name in ("unet", "text_encoder")}
    save_single_file(tmp_path / "bare.safetensors", parts, source.info, source.read_tokenizers()["tokenizer"])
    with pytest.raises(InputError, match=r"bare\.safetensors has no VAE; give one with --vae PATH"):
        load_model(tmp_path / "bare.safetensors", "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    parts["vae"] = read_component(models / "plain", "vae")
    save_single_file(tmp_path / "mute.safetensors", parts, source.info)
    with pytest.raises(InputError, match=r"mute\.safetensors has no tokenizer"):
        load_model(tmp_path / "mute.safetensors", "cpu")


def test_model_index_and_name_of_a_hub_are_no_model(models: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert find_model(tmp_path / "model_index.json") == tmp_path
    with pytest.raises(InputError, match="hf download owner/some-model --local-dir FOLDER, then give the FOLDER"):
        find_model("owner/some-model")


# --- noise schedules --------------------------------------------------------------------------------------------------


def scheduler(folder: Path, models: Path, **values: Any) -> Path:
    copied(models, "plain", "unet", folder)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    return folder


def test_trained_betas_are_ignored(models: Path, tmp_path: Path) -> None:
    """The schedule that a model was trained with, against diffusers' own scheduler; and through a single file."""
    from diffusers import DDIMScheduler

    betas = torch.linspace(0.001, 0.02, 500).tolist()
    info = read_info(scheduler(tmp_path, models, trained_betas=betas))
    expected = DDIMScheduler(trained_betas=betas).alphas_cumprod.double()
    torch.testing.assert_close(diffusion_of(info).process.alphas_cumprod, expected, rtol=1e-5, atol=1e-7)
    save_single_file(tmp_path / "a.safetensors", {"unet": read_component(tmp_path, "unet")}, info)
    assert read_info(tmp_path / "a.safetensors") == info


@pytest.mark.parametrize(
    "values",
    [
        {"beta_start": "0.1"},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": "1000"},
        {"prediction_type": ["epsilon"]},
        {"prediction_type": "flow"},
        {"beta_schedule": 3},
        {"rescale_betas_zero_snr": "yes"},
        {"trained_betas": "x"},
        {"trained_betas": [0.1, "x"]},
        {"trained_betas": [0.1, 2.0]},
    ],
    ids=str,
)
def test_schedule_that_makes_no_sense(values: dict[str, Any], models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"scheduler_config\.json: the configuration says "):
        read_info(scheduler(tmp_path, models, **values))


@pytest.mark.parametrize("text", ["[1]", "{", '{"unet": [1]}', '{"unet": {"attention_head_dim": -1}}', "[" * 100_000])
def test_configuration_in_the_metadata_that_is_none(text: str, models: Path, tmp_path: Path) -> None:
    file = whole(models, tmp_path / "a.safetensors")
    tensors, metadata = read_safetensors(file)
    save_file(tensors, tmp_path / "b.safetensors", {TOKENIZER_KEY: metadata[TOKENIZER_KEY], CONFIG_KEY: text})
    with pytest.raises(InputError, match=r"b\.safetensors"):
        load_unet(tmp_path / "b.safetensors", "cpu")


# --- settings that a picture carries ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"model": 3},
        {"model": ["emoji"]},
        {"vae": {}},
        {"dtype": 16},
        {"lora": "style"},
        {"lora": [["style"]]},
        {"lora": [["style", "1"]]},
        {"lora": [["style", float("nan")]]},
        {"image": 1},
        {"threads": "4"},
        {"threads": 0},
        {"threads": True},
        {"model": "\\\\server\\share\\model"},
        {"image": "//server/share/a.png"},
        {"image": "a\0b"},
    ],
    ids=str,
)
def test_option_of_a_picture_has_the_wrong_type(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        parse_options(values)
