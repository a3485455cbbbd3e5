"""The smallest inputs that once broke a bar; each stands for its kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import lcm_core
from tests.fuzz.guards import FIFO, Case, Content, Worker
from tests.fuzz.models import files_of
from tests.fuzz.mutations import LONE, dump
from tests.fuzz.pictures import png, settings_of
from tests.fuzz.training import picture
from tests.fuzz.weights import KEYS, QUICK, join, split

Changes = dict[str, Any]
PICTURES: dict[str, Changes] = {
    **{f"{count} threads": {"threads": count} for count in (1000, 20_000, 1_000_000, 2**63)},
    **{f"{key} is a number": {key: 5} for key in ("model", "vae", "dtype", "device", "lora", "image", "tokenizer")},
    "timesteps of no numbers": {"timesteps": [["x"]]},
    "no pairs of LoRA": {"lora": [[]]},
    "an image in a list": {"image": [None]},
    "half a character": {"prompt": LONE},
    "a null byte": {"model": "\0"},
    "nested too deep": {"mask": "<deep>"},
    "a long word for a number": {"width": "x" * 5000},
    "a number too long": {"guidance_scale": 10**400},
    "a long name of a file": {"tokenizer": "x" * 5000},
}
CONFIGS: dict[str, tuple[str, Changes]] = {
    "no width of heads": ("unet", {"attention_head_dim": -1}),
    "no groups": ("unet", {"norm_num_groups": 0}),
    "a string for a number": ("unet", {"cross_attention_dim": "x"}),
    "a number for blocks": ("unet", {"block_out_channels": 5}),
    "no channels": ("vae", {"latent_channels": -4}),
    "no heads": ("text_encoder", {"num_attention_heads": 0}),
    "fewer words than the tokenizer has": ("text_encoder", {"vocab_size": 5}),
    "nested too deep": ("vae", {"x": "<deep>"}),
}
COMMANDS = {
    "half a character": ("generate", LONE),
    "a null byte": ("generate", "\0"),
    "a device": ("generate", "a cat", "--output", "/dev/null"),
    "a suffix of 300 letters": ("generate", "a cat", "--output", "a." + "x" * 300),
    "a name of 300 bytes": ("generate", "a cat", "--output", "é" * 150 + ".png"),
    "a name with half a character": ("generate", "a cat", "--output", f"{LONE}.png"),
    "a name of 300 letters": ("generate", "a cat", "--output", "x" * 300 + ".png"),
    "a name with a null byte": ("generate", "a cat", "--output", "\0.png"),
    "a long prompt in EXIF": ("generate", "word " * 20_000, "--output", "a.jpg"),
    "a long word that is no argument": ("generate", "a cat", "x" * 5000),
    "a line that is no argument": ("generate", "a cat", "a\nb"),
}


@pytest.mark.parametrize("command", ["info", "generate"])
@pytest.mark.parametrize("name", PICTURES)
def test_settings_in_a_picture(worker: Worker, tiny_models: Path, name: str, command: str) -> None:
    content = png(dump({**settings_of(tiny_models), **PICTURES[name]}))
    argv = (
        ("info", "INPUTS/a.png") if command == "info" else ("generate", "--from", "INPUTS/a.png", "--output", "b.png")
    )
    assert worker.faults(Case(argv, {"a.png": content})) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_of_a_folder(worker: Worker, tiny_models: Path, name: str) -> None:
    part, changes = CONFIGS[name]
    config = json.loads((tiny_models / "plain" / part / "config.json").read_text())
    assert worker.faults(_with(tiny_models, f"{part}/config.json", dump({**config, **changes}))) == []


def test_length_of_a_tokenizer_that_is_no_number(worker: Worker, tiny_models: Path) -> None:
    config = json.loads((tiny_models / "plain/tokenizer/tokenizer_config.json").read_text())
    content = dump({**config, "model_max_length": [77]})
    assert worker.faults(_with(tiny_models, "tokenizer/tokenizer_config.json", content)) == []


@pytest.mark.parametrize(
    "content", [Path("/dev/zero"), FIFO, b'{"weight_map": 5}', b"{}"], ids=["zero", "fifo", "5", "no"]
)
@pytest.mark.parametrize("name", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.json"])
def test_something_else_than_a_configuration(worker: Worker, tiny_models: Path, name: str, content: Content) -> None:
    assert worker.faults(_with(tiny_models, name, content)) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_command_line(worker: Worker, tiny_models: Path, name: str) -> None:
    command, prompt, *rest = COMMANDS[name]
    argv = (command, prompt, "--model", str(tiny_models / "plain"), *QUICK[:-2], *(rest or QUICK[-2:]))
    assert worker.faults(Case(argv)) == []


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/b.txt", "..", "", "\0", 5])
@pytest.mark.parametrize("host", ["diffusers", "a1111"])
def test_names_of_a_tokenizers_files(worker: Worker, tiny_models: Path, host: str, name: str) -> None:
    header, body = split(tiny_models / "plain.safetensors")
    metadata = header["__metadata__"]
    words = json.loads(metadata["lcm_suite.tokenizer"])
    metadata["lcm_suite.tokenizer"] = json.dumps({**words, str(name): "evil"})
    files: dict[str, Content] = {"a.safetensors": join(dump(header), body)}
    target = "folder" if host == "diffusers" else "host"
    if host == "a1111":  # what tells the web UI's folder from others
        files |= {
            "../output/host/webui.py": b"",
            "../output/host/modules/shared.py": b"",
            "../output/host/models/x": b"",
        }
    argv = ("export", "--to", host, "--model", "INPUTS/a.safetensors", "--path", target)
    assert worker.faults(Case(argv, files)) == []


@pytest.mark.parametrize(
    "offsets", [["a", "b"], [0.5, 1.5], [-1, 4], [0, 2**64], [4, 0], [], None, 5], ids=lambda offsets: str(offsets)
)
def test_offsets_in_a_header(worker: Worker, tiny_models: Path, offsets: object) -> None:
    header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}
    assert worker.faults(Case(("info", "INPUTS/a.safetensors"), {"a.safetensors": join(dump(header), bytes(4))})) == []


LORAS: dict[str, tuple[Changes, dict[str, str]]] = {
    "rank 0": ({"rank": 0}, {}),
    "two alphas": ({"alpha": torch.ones(2)}, {}),
    "int8": ({"dtype": torch.int8}, {}),
    "bool": ({"dtype": torch.bool}, {}),
    "a half without dimensions": ({"half": torch.tensor(1.0)}, {}),
    "norms without dimensions": ({"norms": torch.tensor(1.0)}, {}),
    "metadata that is no JSON": ({}, {"lora_adapter_metadata": "{"}),
    "metadata that is no object": ({}, {"lora_adapter_metadata": "[]"}),
    "metadata nested too deep": ({}, {"lora_adapter_metadata": "[" * 100_000}),
    "a bad pattern": ({}, {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(": 1}}'}),
    "a slow pattern": ({}, {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(.*)*(.*)*(.*)*x": 1}}'}),
}


@pytest.mark.parametrize("command", ["info", "generate"])
@pytest.mark.parametrize("name", LORAS)
def test_lora(worker: Worker, tiny_models: Path, name: str, command: str) -> None:
    odd, metadata = LORAS[name]
    module, down, up = KEYS[1]
    rank, dtype = odd.get("rank", 4), odd.get("dtype", torch.float32)
    tensors = {module + down: torch.ones(rank, 64, dtype=dtype), module + up: torch.ones(64, rank, dtype=dtype)}
    if "half" in odd:
        tensors[module + down] = odd["half"]
    if "norms" in odd:
        tensors[module + ".dora_scale"] = odd["norms"]
    if "alpha" in odd:
        tensors[module + ".alpha"] = odd["alpha"]
    paint = ("generate", "a cat", "--model", str(tiny_models / "plain"), "--lora", "INPUTS/a.safetensors", *QUICK)
    argv = ("info", "INPUTS/a.safetensors") if command == "info" else paint
    assert worker.faults(Case(argv, {"a.safetensors": save(tensors, metadata)})) == []


@pytest.mark.parametrize("name", ["d/1.png", "d/0.txt", "d/metadata.jsonl", "d/0.tar"])
def test_pipe_among_training_data(worker: Worker, tiny_models: Path, name: str) -> None:
    argv = ("cache", "--teacher", str(tiny_models / "plain"), "--data", "INPUTS/d", "--output", "out")
    files: dict[str, Content] = {"d/0.png": png(b"{}"), name: FIFO}
    assert worker.faults(Case(argv, files, program="trainer.cli.main")) == []


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("command", ["info", "generate"])
def test_terminal_without_the_prompts_letters(worker: Worker, tiny_models: Path, command: str, encoding: str) -> None:
    content = png(dump({**settings_of(tiny_models), "prompt": "漢字 🍕"}), b"iTXt")
    argv = (
        ("info", "INPUTS/a.png")
        if command == "info"
        else ("generate", "--from", "INPUTS/a.png", "--output", "漢字.png")
    )
    assert worker.faults(Case(argv, {"a.png": content}, encoding=encoding)) == []


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("how", ["cache", *(pytest.param(how, marks=pytest.mark.slow) for how in ("plan", "run"))])
def test_terminal_without_the_captions_letters(worker: Worker, tiny_models: Path, how: str, encoding: str) -> None:
    """The trainer names pictures, captions and folders."""
    options = ("--teacher", str(tiny_models / "plain"), "--data", "INPUTS/漢字", "--output", "🍕", "--resolution", "64")
    training = ("--steps", "1", "--batch-size", "1", "--rank", "2", "--samples", "0", "--no-tensorboard")
    argv = {"cache": ("cache",), "plan": ("distill", *training, "--dry-run"), "run": ("distill", *training)}[how]
    caption = "漢字 🍕".encode()
    files: dict[str, Content] = {"漢字/0.png": picture(), "漢字/0.txt": caption, "漢字/🍕.png": b"no picture"}
    assert worker.faults(Case((*argv, *options), files, program="trainer.cli.main", encoding=encoding)) == []


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_real_process(tmp_path: Path, encoding: str) -> None:
    """What the worker does in a fork holds for a process of its own, which a terminal starts."""
    (tmp_path / "a.png").write_bytes(png(dump({"prompt": "漢字"})))
    root = Path(lcm_core.__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONIOENCODING": encoding,
        "PYTHONPATH": str(root),
        "PYTHONUTF8": "0",
        "LC_ALL": "C",
    }
    command = [sys.executable, "-m", "lcm_core", "info", "a.png"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"prompt: " in done.stdout
    assert os.listdir(tmp_path) == ["a.png"]


def _with(models: Path, name: str, content: Content) -> Case:
    """The whole model with another content of one file."""
    files: dict[str, Content] = {f"m/{other}": path for other, path in files_of(models / "plain").items()}
    if name.endswith(".index.json"):
        del files[f"m/{name.removesuffix('.index.json')}"]
    return Case(("generate", "a cat", "--model", "INPUTS/m", *QUICK), {**files, f"m/{name}": content})
