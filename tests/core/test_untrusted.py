"""Files from outside: each way in has one door, which lets nothing through but what it is for."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lcm_core.cli.main import main, run_command
from lcm_core.errors import InputError
from lcm_core.files.checkpoint import CONFIG_KEY, TOKENIZER_KEY, read_component, read_info, save_single_file
from lcm_core.files.reading import is_plain_name, parse_json, read_json
from lcm_core.files.safetensors import check_file, read_folder, read_safetensors
from lcm_core.networks.device import choose_device, choose_dtype
from lcm_core.networks.text_encoder import load_text
from lcm_core.networks.tokenizer import TOKENIZER_FILES, find_tokenizer, read_tokenizer_files
from lcm_core.networks.unet import load_unet
from lcm_core.networks.vae import load_vae
from lcm_core.pipeline.image import encode_image, open_image, read_settings, save_image
from lcm_core.pipeline.model import diffusion_of, load_model
from lcm_core.pipeline.options import parse_options
from lcm_core.pipeline.settings import Settings
from lcm_core.pipeline.sources import find_model, find_source
from trainer.cli.main import main as trainer_main

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and devices in the file system")


def copied(models: Path, name: str, part: str, folder: Path) -> Path:
    """A copy of one network's folder that a test may spoil."""
    return Path(shutil.copytree(models / name / part, folder / part))


def changed(folder: Path, **values: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def whole(models: Path, file: Path, tokenizer: dict[str, str] | None = None) -> Path:
    """The tiny plain model as one file."""
    source = find_source(models / "plain")
    parts = {name: read_component(models / "plain", name) for name in ("unet", "vae", "text_encoder")}
    save_single_file(file, parts, source.info, tokenizer or source.read_tokenizers()["tokenizer"])
    return file


# --- JSON, and what is no plain file ----------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("reader", [read_json, check_file, read_safetensors, open_image])
def test_pipe_or_device_is_waited_for_or_read_without_end(reader: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, words in (("pipe", "a device or a pipe"), ("zero", "a device or a pipe"), ("folder", "a folder")):
        with pytest.raises(InputError, match=f"{name} is {words}, not a file"):
            reader(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested too deep"),
        ("[1]", "holds no JSON object"),
        ("{", "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b'{"a": "' + b"x" * 2**24 + b'"}', "longer than"),
        (r'{"a": "\ud800"}', "surrogates not allowed"),
        ('{"a": ' + "9" * 5000 + "}", "not readable JSON"),
    ],
)
def test_json_that_no_program_of_good_will_writes(text: str | bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        parse_json(text, "the file")
    assert str(caught.value).startswith("the file ")
    assert "\n" not in str(caught.value)


def test_usual_json_is_refused() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [{"b": "\\ud83c\\udf55"}]}', "it") == {"a": [{"b": "\U0001f355"}]}


def test_names_that_lead_out_of_a_folder() -> None:
    bad = ["../a", "/a", "a/b", "a\\b", "..", ".", ".hidden", "", "a\0", "c:a", "a.", 3, None]
    assert [name for name in bad if is_plain_name(name)] == []
    assert all(map(is_plain_name, ["model-00001-of-00002.safetensors", "modèle (1).safetensors"]))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "no weight_map"),
        ({"weight_map": ["a"]}, "no weight_map"),
        ({"weight_map": {"a": 3}}, "names 3, which is no .safetensors file beside it"),
        ({"weight_map": {"a": "../other.safetensors"}}, "names '../other.safetensors', which is no"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd', which is no"),
    ],
)
def test_index_that_names_something_else(index: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=words):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.5]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"a": 3},
        {"__metadata__": [1]},
        {"__metadata__": {"a": {"b": 1}}},
    ],
)
def test_header_with_something_else_than_offsets_and_texts(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(InputError, match="not a safetensors file"):
        check_file(tmp_path / "a.safetensors")


# --- names from files become paths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil.txt", "{root}/evil.txt", "sub/evil.txt", "__init__.py"])
@pytest.mark.parametrize("host", ["diffusers", "a1111"])
def test_checkpoint_chooses_where_export_writes(
    name: str, host: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "host" / "modules").mkdir(parents=True)
    (tmp_path / "host" / "modules" / "sd_models.py").write_text("")
    words = find_source(models / "plain").read_tokenizers()["tokenizer"]
    file = whole(models, tmp_path / "model.safetensors", words | {name.format(root=tmp_path): "evil"})
    path = tmp_path / "host" if host == "a1111" else tmp_path / "out"
    assert main(["export", "--model", str(file), "--to", host, "--path", str(path)]) == 0
    assert "which is not used" in capsys.readouterr().err
    assert not any(path.name in ("evil.txt", "__init__.py") for path in tmp_path.rglob("*"))
    written = {path.name for path in tmp_path.rglob("tokenizer/*")}
    assert written - {"config.json"} <= set(TOKENIZER_FILES)
    assert "vocab.json" in written


def test_model_writes_its_own_lines_into_the_web_ui_s_description(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The .yaml names the classes that the host imports: a text in place of a number could name others."""
    file = whole(models, tmp_path / "model.safetensors")
    tensors, metadata = read_safetensors(file)
    stated = json.loads(metadata[CONFIG_KEY])
    stated["unet"]["sample_size"] = "8\n    evil: 1"
    save_file(tensors, file, {TOKENIZER_KEY: metadata[TOKENIZER_KEY], CONFIG_KEY: json.dumps(stated)})
    (tmp_path / "host" / "modules").mkdir(parents=True)
    (tmp_path / "host" / "modules" / "sd_models.py").write_text("")
    assert main(["export", "--model", str(file), "--to", "a1111", "--path", str(tmp_path / "host")]) == 2
    assert "says sample_size = '8" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.yaml"))


@pytest.mark.parametrize("text", ["[", "[]", '{"vocab.json": 3}', "[" * 100_000])
def test_tokenizer_in_the_metadata_that_is_none(text: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {TOKENIZER_KEY: text})
    with pytest.raises(InputError, match=r"lcm_suite.tokenizer.*a\.safetensors.*export it again"):
        read_tokenizer_files(tmp_path / "a.safetensors")


@POSIX
def test_tokenizer_opens_files_that_its_configuration_names(models: Path, tmp_path: Path) -> None:
    folder = copied(models, "plain", "tokenizer", tmp_path)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"merges_file": "/dev/zero"}))
    assert find_tokenizer(tmp_path)("cat")["input_ids"]
    (folder / "merges.txt").unlink()
    (folder / "merges.txt").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="a device or a pipe"):
        find_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json"])
def test_damaged_tokenizer_is_copied_into_an_export(name: str, models: Path, tmp_path: Path) -> None:
    """Wrong when the copy, which says nothing of its source, were the first that cannot be read."""
    shutil.copytree(models / "plain", tmp_path / "m")
    (tmp_path / "m" / "tokenizer" / name).write_text("{")
    for to, path in (("diffusers", "folder"), ("single-file", "a.safetensors")):
        assert main(["export", "--model", str(tmp_path / "m"), "--to", to, "--path", str(tmp_path / path)]) == 2
        assert not (tmp_path / path).exists()


def test_lora_is_refused_after_loading(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcm_core.pipeline.model.load_unet", lambda *_: pytest.fail("the U-Net was loaded first"))
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors"):
        load_model(models / "plain", "cpu", lora=[(tmp_path / "a.safetensors", 1.0)])


# --- networks from configurations -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"attention_head_dim": -1},
        {"attention_head_dim": "8"},
        {"norm_num_groups": 0},
        {"norm_num_groups": 7},
        {"block_out_channels": 32},
        {"block_out_channels": []},
        {"block_out_channels": [32, "64"]},
        {"block_out_channels": [10**12] * 4},
        {"layers_per_block": 10**9},
        {"layers_per_block": True},
        {"cross_attention_dim": None},
        {"sample_size": "8"},
        {"sample_size": 0},
        {"in_channels": 3.5},
        {"down_block_types": "CrossAttnDownBlock2D"},
        {"down_block_types": ["NoBlock"] * 4},
        {"norm_eps": "small"},
        {"act_fn": 3},
        {"class_embed_type": "timestep"},
        {"time_cond_proj_dim": [256]},
        {"_class_name": ["UNet2DConditionModel"]},
    ],
    ids=str,
)
def test_unet_with_a_configuration_that_makes_no_sense(values: dict[str, Any], models: Path, tmp_path: Path) -> None:
    folder = changed(copied(models, "plain", "unet", tmp_path), **values)
    with pytest.raises(InputError) as caught:
        load_unet(tmp_path, "cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    key, value = next(iter(values.items()))
    if key not in ("_class_name", "act_fn", "cross_attention_dim") and value not in (7, ["NoBlock"] * 4):
        assert f"says {key} = " in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [{"norm_num_groups": 0}, {"latent_channels": "4"}, {"scaling_factor": 0}, {"scaling_factor": "x"}, {"act_fn": 3}],
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
    monkeypatch.setattr("lcm_core.pipeline.model.load_unet", lambda *_: pytest.fail("the U-Net was loaded first"))
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


@pytest.mark.parametrize(
    "values",
    [{"timesteps": ["a"]}, {"timesteps": [1.5]}, {"timesteps": 3}, {"seed": 1.0}, {"width": True}, {"prompt": 3}],
    ids=str,
)
def test_setting_of_a_picture_has_the_wrong_type(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="has the wrong type"):
        parse_options(values)


@pytest.mark.parametrize("values", [{"prompt": "a\0"}, {"prompt": "\ud800"}, {"seed": 2**64}, {"upscale": 10**400}])
def test_setting_is_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Settings(**values).check()


def picture(path: Path, **settings: Any) -> str:
    save_image(Image.new("RGB", (8, 8)), path, settings)
    return str(path)


def test_missing_size_is_another_model_s(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture of another program may say no more than a prompt: size, sampler and steps are the model's then."""
    model = str(models / "emoji")
    argv = ["generate", "--from", picture(tmp_path / "a.png", prompt="a", model=model, threads=10**6)]
    before = torch.get_num_threads()
    assert main([*argv, "--output", str(tmp_path / "b.png")]) == 0
    assert Image.open(tmp_path / "b.png").size == (64, 64)
    assert torch.get_num_threads() == before
    errors = capsys.readouterr().err
    assert f"a.png uses model '{model}'" in errors  # whoever made the picture chose what is opened
    assert "painted with 1000000 threads, here are" in errors


@POSIX
def test_picture_makes_us_read_a_device(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model", "vae", "image", "tokenizer"):
        file = picture(tmp_path / "a.png", prompt="a", **{"model": str(models / "emoji"), name: "/dev/zero"})
        assert main(["generate", "--from", file, "--output", str(tmp_path / "b.png")]) == 2
        assert "/dev/zero" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


def test_picture_runs_another_program(tmp_path: Path) -> None:
    """Pillow would hand a PostScript file to Ghostscript."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="as a picture"):
        open_image(tmp_path / "a.png")


# --- words, names and terminals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminal_without_the_letters_ends_in_an_error(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = picture(tmp_path / "a.png", prompt="猫")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["info", file]) == 0
    out.seek(0)
    assert out.read().startswith("prompt: \\u732b")


def test_picture_sends_commands_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", picture(tmp_path / "a.png", prompt="caf\u00e9 \x1b]0;title\x07")]) == 0
    assert capsys.readouterr().out == "prompt: caf\u00e9 \\x1b]0;title\\x07\n"


def test_complaint_about_half_a_character_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["info", "no\udcffmodel"]) == 2
    err.seek(0)
    assert "no\\udcffmodel" in err.read()


def test_name_that_is_no_text_spoils_the_picture(tmp_path: Path) -> None:
    """On Linux a path may hold bytes that are no UTF-8."""
    for suffix in (".png", ".jpg"):
        (tmp_path / f"a{suffix}").write_bytes(
            encode_image(Image.new("RGB", (8, 8)), suffix, {"prompt": "a", "model": "no\udcffmodel"})
        )
        assert read_settings(tmp_path / f"a{suffix}") == {"prompt": "a", "model": "no?model"}


def test_what_no_file_can_hold_is_found_after_painting(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lcm_core.pipeline.pipeline.paint", lambda *_: pytest.fail("painted in vain"))
    monkeypatch.chdir(tmp_path)
    argv = ["generate", "--model", str(models / "emoji"), "--output"]
    cases = (
        ([*argv, "a.jpg", "a" * 66_000], "too long to be stored in a.jpg"),
        ([*argv, "a.png", "a" * 2**20], "too long to be stored in a.png"),
        ([*argv, "a" * 300 + ".png", "a"], "more than 255 bytes"),
        ([*argv, "a" * 300 + "/a.png", "a"], "more than 255 bytes"),
        ([*argv, "a.png", "a\udcff"], "is no valid text"),
        (["generate", "a", "--model", "m" * 300], "cannot use mmm"),
        ([*argv, ".png", "a"], "has no name before .png"),
    )
    for command, words in cases:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert words in error.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_picture_of_too_many_pixels_fills_the_memory(tmp_path: Path) -> None:
    Image.new("1", (20_000, 6_000)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="has 20000x6000 pixels; make it smaller"):
        open_image(tmp_path / "a.png")


def test_numbers_that_end_in_an_error_later(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "a", "--model", str(models / "emoji"), "--output", "never.png"]
    for options in (["--count", "1000000000"], ["--seed", str(2**64 - 1), "--count", "2"], ["--seed", "9" * 30]):
        assert main([*argv, *options]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert main([*argv, "--timesteps", "9" * 30]) == 2
    assert not Path("never.png").exists()


def test_abbreviation_is_taken_for_another_option(capsys: pytest.CaptureFixture[str]) -> None:
    ours = [(main, argv) for argv in (["generate", "a", "--n", "2"], ["export", "--pa", "x"], ["--vers"])]
    theirs = (
        ["distill", "--step", "2"],
        ["cache", "--dat", "x"],
        ["eval", "--n", "2"],
        ["recipe", "emoji", "--out", "x"],
    )
    for run, argv in [*ours, *((trainer_main, argv) for argv in theirs)]:
        with pytest.raises(SystemExit) as stop:
            run(argv)
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(("options", "noted"), [(["--size", "128"], True), (["--upscale", "2"], True), ([], False)])
def test_size_far_from_the_model_s_is_not_noted(
    options: list[str], noted: bool, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "a", "--model", str(models / "emoji"), "--steps", "1", "--output", str(tmp_path / "a.png")]
    assert main([*argv, *options]) == 0
    assert ("was trained at 64x64 pixels" in capsys.readouterr().err) == noted


# --- devices and number formats ---------------------------------------------------------------------------------------


def test_card_without_bfloat16_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says yes for cards before Ampere too, and emulates; float16 is what these are quick at."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_dtype("cuda") == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # torch 2.1 does not know the word
    assert choose_dtype("cuda") == torch.bfloat16


def test_gpu_of_intel_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert choose_device() == torch.device("xpu")
    assert choose_dtype("xpu") == torch.bfloat16


def test_missing_device_is_answered_with_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcm_core.networks.device._fastest_device", lambda: "cpu")
    for name in ("abacus", "meta"):
        with pytest.raises(InputError, match=f"device '{name}' is not available here; use 'cpu'$"):
            choose_device(name)


def test_command_without_a_terminal_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that notebooks and hosts put in place of a terminal know no error handlers."""
    import argparse

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run_command(argparse.Namespace(run=lambda args: print("猫")), "", "") == 0
