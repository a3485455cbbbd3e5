"""Files from outside: each way in has one door, which lets nothing through but what it is for."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lcm_core.cli.main import main
from lcm_core.errors import InputError
from lcm_core.files.checkpoint import CONFIG_KEY, TOKENIZER_KEY, read_component, save_single_file
from lcm_core.files.reading import is_plain_name, parse_json, read_json
from lcm_core.files.safetensors import check_file, read_folder, read_safetensors
from lcm_core.networks.tokenizer import TOKENIZER_FILES, find_tokenizer, read_tokenizer_files
from lcm_core.networks.unet import load_unet
from lcm_core.pipeline.image import open_image
from lcm_core.pipeline.model import load_model
from lcm_core.pipeline.sources import find_source

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
    monkeypatch.setattr("lcm_core.pipeline.parts.load_unet", lambda *_: pytest.fail("the U-Net was loaded first"))
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
