"""What Forge must be told of models of unusual size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from extension_a1111.forge_models import find_entries


def folder(root: Path, name: str, width: int, heads: object = 2, index: bool = True) -> Path:
    (root / name / "unet").mkdir(parents=True)
    config = {"cross_attention_dim": 128, "block_out_channels": [width, 64], "attention_head_dim": heads}
    (root / name / "unet" / "config.json").write_text(json.dumps(config))
    if index:
        (root / name / "model_index.json").write_text("{}")
    return root / name


def test_sizes_of_exported_models_are_found_once_each(tmp_path: Path) -> None:
    folder(tmp_path, "sub/a.config", 32)
    last = folder(tmp_path, "sub/b.config", 32)
    other = folder(tmp_path, "c.config", 64, heads=4)
    found = {
        entry.folder: (entry.match["model_channels"], entry.extra["num_heads"]) for entry in find_entries(tmp_path)
    }
    assert found == {last: (32, 2), other: (64, 4)}
    assert all(entry.match["context_dim"] == 128 for entry in find_entries(tmp_path))


def test_foreign_and_broken_folders_are_left_out(tmp_path: Path) -> None:
    folder(tmp_path, "half.config", 32, index=False)
    folder(tmp_path, "odd.config", 32, heads=[5, 10])
    (tmp_path / "empty.config").mkdir()
    (folder(tmp_path, "broken.config", 32) / "unet" / "config.json").write_text("{")
    assert find_entries(tmp_path) == []


def test_neo_learns_the_model_from_its_list_of_folders_in_both_of_its_tables(
    fake_host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neo has `ckpt_dirs` and no `ckpt_dir`, and its loader takes no type that `matched_guesses` does not name."""
    exported = folder(tmp_path, "second/emoji.config", 32)
    theirs = type("SD15", (), {"unet_config": {"context_dim": 768, "num_res_blocks": 2}})
    models, engine = SimpleNamespace(SD15=theirs, models=[theirs]), SimpleNamespace(matched_guesses=[theirs])
    for name in ("backend", "backend.diffusion_engine", "backend.diffusion_engine.sd15", "huggingface_guess"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["backend.diffusion_engine.sd15"].StableDiffusion = engine  # type: ignore[attr-defined]
    sys.modules["huggingface_guess"].model_list = models  # type: ignore[attr-defined]
    fake_host.sd_models.model_path = str(tmp_path / "models")
    fake_host.shared.cmd_opts = SimpleNamespace(ckpt_dirs=[str(tmp_path / "first"), str(tmp_path / "second")])
    fake_host.load_script("lcm_forge_models")
    for table in (models.models, engine.matched_guesses):
        assert [known.__name__ for known in table] == ["SD15OwnSize", "SD15"]
        assert table[0].huggingface_repo == str(exported)
        assert table[0].unet_config == {"context_dim": 128, "num_res_blocks": 2, "model_channels": 32}
