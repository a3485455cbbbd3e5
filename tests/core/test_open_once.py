"""A checkpoint is opened, and its names are translated, once for one load, however many networks come out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lcm_core.cli.main import main
from lcm_core.files import ldm_convert, safetensors, single_file
from lcm_core.files.checkpoint import Checkpoint, read_component
from lcm_core.pipeline.model import load_model
from tests.core.test_export_again import export


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """The first argument of every call of a function, which works as before."""
    calls: list[Any] = []
    original = getattr(module, name)

    def call(first: Any, *args: Any, **options: Any) -> Any:
        calls.append(first)
        return original(first, *args, **options)

    monkeypatch.setattr(module, name, call)
    return calls


def test_one_load_opens_and_converts_a_single_file_more_than_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = export("single-file", str(models / "emoji"), tmp_path)
    opened = counted(monkeypatch, safetensors, "safe_open")
    converted = counted(monkeypatch, ldm_convert, "ldm_to_diffusers")
    header = counted(monkeypatch, safetensors, "check_file")
    load_model(file, "cpu")
    assert opened == [file]
    assert len(converted) == 1
    assert header == [file]


def test_a_network_that_was_changed_by_its_taker_is_handed_out_again(models: Path, tmp_path: Path) -> None:
    """Two takers of one tensor would train or merge into each other's weights."""
    file = export("single-file", str(models / "emoji"), tmp_path)
    checkpoint = Checkpoint(file)
    first = checkpoint.take("unet")
    for tensor in first.tensors.values():
        tensor.zero_()
    again, fresh = checkpoint.take("unet").tensors, read_component(file, "unet").tensors
    torch.testing.assert_close(again, fresh, rtol=0, atol=0)
    assert any(bool(tensor.any()) for tensor in again.values())


def test_a_file_is_checked_again_after_it_has_changed(models: Path, tmp_path: Path) -> None:
    file = export("single-file", str(models / "emoji"), tmp_path)
    Checkpoint(file).take("vae")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(single_file.InputError, match="damaged"):
        Checkpoint(file).take("vae")


def test_info_opens_a_single_file_more_than_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = export("single-file", str(models / "emoji"), tmp_path)
    capsys.readouterr()
    opened = counted(monkeypatch, safetensors, "safe_open")
    assert main(["info", str(file)]) == 0
    assert opened == [file]
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert all("M parameters" in lines[name] for name in ("unet", "vae", "text_encoder"))


def test_info_leaves_out_the_networks_of_a_damaged_file(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = export("single-file", str(models / "emoji"), tmp_path)
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert main(["info", str(file)]) == 2
    assert "damaged" in capsys.readouterr().err
