"""Six small pictures with captions, and the cache that is made of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcm_core.pipeline.sources import MODELS
from trainer.data.cache import Pick, prepare
from trainer.data.settings import DataConfig

EMOJI = MODELS / "emoji"
SIZES = [(96, 64), (64, 96), (80, 80), (200, 64), (40, 40), (64, 64)]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Six pictures, five captions, and one JPEG that was cut short."""
    root = tmp_path_factory.mktemp("photos")
    numbers = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        noise = numbers.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(root / f"{i}.jpg")
        if i:
            (root / f"{i}.txt").write_text(f"picture number {i}")
    (root / "5.txt").write_text("picture number 4")  # two pictures share a caption
    broken = (root / "1.jpg").read_bytes()
    (root / "broken.jpg").write_bytes(broken[: len(broken) // 2])
    return root


@pytest.fixture(scope="session")
def config(photos):
    return DataConfig(path=str(photos), shard_size=3, cache_batch=2, resolution=64)


@pytest.fixture(scope="session")
def made(config, tmp_path_factory):
    """A finished cache of the pictures, by the embedded model; not to be changed."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, prepare(config, "emoji", folder, "cpu")


@pytest.fixture
def copied(made, tmp_path):
    """A copy of that cache, which a test may spoil."""
    return Path(shutil.copytree(made[0], tmp_path / "copied"))


@pytest.fixture
def no_networks(monkeypatch):
    """Fails a test in which anything is computed anew."""

    def refuse(*_):
        pytest.fail("a network was loaded")

    monkeypatch.setattr("trainer.data.cache.Images.load", refuse)
    monkeypatch.setattr("trainer.data.cache.text_maker", refuse)


def contents(folder):
    """All bytes of all shards, but for the order of their metadata, which the format does not fix."""
    return {str(path.relative_to(folder)): parse(path) for path in sorted(folder.rglob("*.safetensors"))}


def parse(shard):
    """Header and data."""
    content = shard.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def rows(cache):
    """All that a cache with one bucket holds, in its order."""
    (bucket,) = cache.buckets
    return cache.read([Pick(bucket, row, False) for row in range(len(cache))])
