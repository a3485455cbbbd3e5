"""Model folders that are odd: configurations, shards, tokenizers, devices in the place of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.guards import FIFO, Case, Content
from tests.fuzz.mutations import TEXTS, damaged, odd_json
from tests.fuzz.weights import QUICK

_JSON = (
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer/tokenizer.json",
)
_CARD = "model.json"
_DEVICES: list[Content] = [FIFO, Path("/dev/zero"), Path("/dev/null"), Path("/nowhere")]
_INSTEAD: list[Content] = [*_DEVICES, b"", b"\xff\xfe", b"[]", b"null"]
_INDEX = "diffusion_pytorch_model.safetensors"


def files_of(folder: Path) -> dict[str, Path]:
    """Every file of a model, by its path inside the folder."""
    return {path.relative_to(folder).as_posix(): path for path in _walk(folder)}


def _walk(folder: Path) -> list[Path]:
    inside = sorted(folder.iterdir())
    return [file for path in inside for file in (_walk(path) if path.is_dir() else [path])]


@st.composite
def _odd_index(draw: st.DrawFn) -> tuple[dict[str, Content], str]:
    """The U-Net in shards, by an index that is odd."""
    names = ["diffusion_pytorch_model-00001-of-00001.safetensors", *TEXTS, "../vae/" + _INDEX, "/dev/zero"]
    keys = st.sampled_from(["conv_in.weight", "x", ""])
    index = {"metadata": {"total_size": 1}, "weight_map": draw(st.dictionaries(keys, st.sampled_from(names)))}
    content, about = draw(odd_json(index))
    return {f"unet/{_INDEX}.index.json": content}, about


@st.composite
def _odd_part(draw: st.DrawFn, whole: dict[str, Path]) -> tuple[dict[str, Content | None], str]:
    """What to put in the place of one file of a model; None takes it away."""
    how = draw(st.sampled_from(["json", "json", "json", "json", "instead", "index", "merges", "remove"]))
    if how == "index":
        index, about = draw(_odd_index())
        return {f"unet/{_INDEX}": None, **index}, about
    if how == "merges":
        content, about = draw(damaged(b"#version: 0.2\na b</w>\nc d\n"))
        return {"tokenizer/merges.txt": content, "tokenizer/tokenizer.json": None}, about
    names = sorted(whole) if how != "json" else [name for name in (*_JSON, _CARD) if name in whole]
    name = draw(st.sampled_from(names))
    if how == "remove":
        return {name: None}, f"{name} removed"
    if how == "instead":
        instead = draw(st.sampled_from(_INSTEAD))
        return {name: instead}, f"{name} is {instead!s:.40}"
    document: dict[str, Any] = json.loads(whole[name].read_text(encoding="utf-8"))
    content, about = draw(odd_json(document))
    without: dict[str, Content | None] = {"tokenizer/tokenizer.json": None} if name == "tokenizer/vocab.json" else {}
    return {**without, name: content}, f"{name}: {about}"


@st.composite
def folder_case(draw: st.DrawFn, models: Path) -> Case:
    """An odd folder, given to a command that reads it."""
    whole = files_of(models / draw(st.sampled_from(["plain", "plain", "lcm", "emoji"])))
    changed, about = draw(_odd_part(whole))
    files: dict[str, Content] = {f"m/{name}": path for name, path in whole.items()}
    for name, content in changed.items():
        files.pop(f"m/{name}", None)
        if content is not None:
            files[f"m/{name}"] = content
    argv = draw(
        st.sampled_from(
            [
                ("info", "INPUTS/m"),
                ("generate", "a cat", "--model", "INPUTS/m", *QUICK),
                ("generate", "a cat", "--model", "INPUTS/m", *QUICK, "--sampler", "euler"),
                ("export", "--to", "single-file", "--model", "INPUTS/m", "--path", "a.safetensors"),
                ("export", "--to", "diffusers", "--model", "INPUTS/m", "--path", "folder"),
            ]
        )
    )
    return Case(argv, files, about)
