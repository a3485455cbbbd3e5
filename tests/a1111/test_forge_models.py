"""What Forge must be told of models of unusual size."""

from __future__ import annotations

import json
from pathlib import Path

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
