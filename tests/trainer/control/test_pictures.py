"""Control pictures in the cache: beside their own pictures, made again where they change, missed by name."""

from __future__ import annotations

import shutil

import torch
from PIL import Image
from torch.testing import assert_close

from tests.trainer.control.models import first_rows
from trainer.data.augment import make_variant
from trainer.data.buckets import make_buckets
from trainer.data.cache import prepare
from trainer.data.items import decode
from trainer.data.pictures import Encoder
from trainer.data.settings import DataConfig


def test_a_control_picture_is_cropped_and_mirrored_like_its_picture(photos, tmp_path):
    """Each picture is its own control picture, twice as large: then what is seen is the picture in the cache."""
    data, doubled = tmp_path / "data", tmp_path / "doubled"
    (data / "inner").mkdir(parents=True)
    (doubled / "inner").mkdir(parents=True)
    for number, size in enumerate([(192, 128), (90, 140), (128, 128)]):
        name = f"inner/{number}" if number else f"{number}"
        picture = Image.effect_noise((6, 6), 90).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        picture.save(data / f"{name}.png")
        picture.resize((2 * size[0], 2 * size[1]), Image.Resampling.BICUBIC).save(doubled / f"{name}.bmp")
    config = DataConfig(
        path=str(data), control_pictures=str(doubled), resolution=128, flip=True, crop=0.5, variants=4, shard_size=8
    )
    cache = prepare(config, "emoji", tmp_path / "cache", "cpu")
    buckets, found = make_buckets(128, 64), []
    for name in ("0.png", "inner/1.png", "inner/2.png"):
        picture = decode((data / name).read_bytes(), name)
        found += [make_variant(picture, name, number, buckets, config)[0] for number in range(4)]
    seen = [hint for bucket in cache.buckets.items() for hint in cache.read(first_rows(*bucket)).conditioning["hint"]]
    assert len(seen) == len(found) == 12
    for hint in seen:
        alike = [image for image in found if image.shape[1:] == hint.shape]
        assert min(float((image[0] / 2 + 0.5 - hint).abs().mean()) for image in alike) < 0.02


def test_rows_with_control_pictures_are_taken_over_by_such_alone(photos, hints, tmp_path, monkeypatch):
    """Another control picture makes its own row again; a cache without them takes none of those rows."""
    decoded, variants = [], Encoder._variants
    monkeypatch.setattr(Encoder, "_variants", lambda self, item: decoded.append(item.key) or variants(self, item))
    folder = shutil.copytree(hints, tmp_path / "hints")
    config = DataConfig(path=str(photos), control_pictures=str(folder), resolution=64)
    first = prepare(config, "emoji", tmp_path / "cache", "cpu")
    assert sorted(decoded) == [f"{number}.png" for number in range(6)]
    decoded.clear()
    Image.new("RGB", (8, 8), "white").save(folder / "3.webp", lossless=True)
    again = prepare(config, "emoji", tmp_path / "cache", "cpu")
    assert decoded == ["3.png"]
    ((bucket, _),) = again.buckets.items()
    rows = [cache.read(first_rows(bucket, 6)).conditioning["hint"] for cache in (first, again)]
    changed = [row for row in range(6) if not torch.equal(rows[0][row], rows[1][row])]
    assert changed == [3]
    assert_close(rows[1][3], torch.ones(3, 64, 64))
    decoded.clear()
    plain = prepare(DataConfig(path=str(photos), resolution=64), "emoji", tmp_path / "cache", "cpu")
    assert len(decoded) == 6
    assert "hint" not in plain.read(first_rows(bucket, 2)).conditioning


def test_a_picture_without_a_control_picture_is_left_out_by_name(photos, hints, tmp_path):
    folder = shutil.copytree(hints, tmp_path / "hints")
    (folder / "2.webp").unlink()
    config = DataConfig(path=str(photos), control_pictures=str(folder), resolution=64)
    cache = prepare(config, "emoji", tmp_path / "cache", "cpu")
    assert len(cache) == 5
    ((name, reason),) = cache.skipped
    assert (name, "no control picture 2.png" in reason) == ("2.png", True)
