"""One more picture or caption: what an earlier cache in the same folder holds is not encoded again."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lcm_core.files.safetensors import read_safetensors
from trainer.data import cache as caches
from trainer.data.cache import prepare
from trainer.data.pictures import Encoder
from trainer.data.rows import CHECKSUMS
from trainer.data.settings import DataConfig


@pytest.fixture
def grown(photos, tmp_path):
    """The pictures, and one more that comes first by its name, so that all numbers move."""
    data = tmp_path / "grown"
    shutil.copytree(photos, data)
    Image.new("RGB", (96, 96), (40, 120, 200)).save(data / "0 new.png")
    (data / "0 new.txt").write_text("a new picture")
    return data


@pytest.fixture
def encoded(monkeypatch):
    """The names of the pictures that are decoded, and the captions that are encoded."""
    pictures, captions = [], []
    variants, texts = Encoder._variants, caches.text_maker

    def listen(written, *args):
        make = texts(written, *args)
        return lambda numbers: captions.extend(written[number] for number in numbers) or make(numbers)

    monkeypatch.setattr(Encoder, "_variants", lambda self, item: pictures.append(item.key) or variants(self, item))
    monkeypatch.setattr(caches, "text_maker", listen)
    return pictures, captions


def _shards(folder, cache):
    """The tensors of all shards that a cache reads, but for their checksums: the last bit of a latent depends on what
    it was encoded beside."""
    latents = cache._folder
    texts = folder / cache.about["texts"]
    files = [file for part in (latents, texts) for file in sorted(part.glob("0*.safetensors"))]
    tensors = {f"{file.parent.name.partition('-')[0]}/{file.name}": read_safetensors(file)[0] for file in files}
    return {
        file: {name: value for name, value in content.items() if not name.startswith(CHECKSUMS.strip())}
        for file, content in tensors.items()
    }


@pytest.mark.parametrize("shard_size", [4, 3])
def test_only_what_is_new_is_encoded_and_the_cache_is_as_if_made_anew(
    config, copied, grown, tmp_path, encoded, shard_size
):
    settings = replace(config, path=str(grown), shard_size=shard_size)
    cache = prepare(settings, "emoji", copied, "cpu")
    pictures, captions = encoded
    broken = {name.partition("/")[2] or name for name, _ in cache.skipped}
    assert "0 new.png" in pictures
    assert set(pictures) - broken == {"0 new.png"}, "beside it only what cannot be read is tried again"
    assert captions == ["a new picture"]
    anew = prepare(settings, "emoji", tmp_path / "anew", "cpu")
    torch.testing.assert_close(_shards(copied, cache), _shards(tmp_path / "anew", anew), rtol=0, atol=2e-3)
    assert cache.skipped == anew.skipped


@pytest.fixture
def longer(photos, tmp_path):
    """The pictures, and one more behind them: only the shard that it comes into differs."""
    data = tmp_path / "longer"
    shutil.copytree(photos, data)
    Image.new("RGB", (96, 96), (40, 120, 200)).save(data / "z.png")
    (data / "z.txt").write_text("a new picture")
    return data


def test_shards_in_front_of_what_is_added_are_the_same_files(config, copied, longer, tmp_path):
    """Nothing of them is written again; those with what could not be used, or with the new, are made."""
    before = {file.stat().st_ino for file in copied.rglob("0*.safetensors")}
    cache = prepare(replace(config, path=str(longer)), "emoji", copied, "cpu")
    shared = [file.name for file in sorted(cache._folder.glob("0*.safetensors")) if file.stat().st_ino in before]
    assert shared == ["000000.safetensors", "000001.safetensors"]
    texts = [file for file in (copied / cache.about["texts"]).glob("0*.safetensors") if file.stat().st_ino in before]
    assert [file.name for file in texts] == ["000000.safetensors"]
    anew = prepare(replace(config, path=str(longer)), "emoji", tmp_path / "anew", "cpu")
    torch.testing.assert_close(_shards(copied, cache), _shards(tmp_path / "anew", anew), rtol=0, atol=2e-3)


def test_a_damaged_shard_is_not_taken_over(config, copied, longer, encoded):
    (latents,) = copied.glob("latents-*")
    first = latents / "000000.safetensors"
    first.write_bytes(first.read_bytes()[:-1] + b"\x99")
    with pytest.warns(UserWarning, match="made again"):
        cache = prepare(replace(config, path=str(longer)), "emoji", copied, "cpu")
    assert len(set(encoded[0])) > 1
    for picks in [cache.draw(4, torch.Generator().manual_seed(seed)) for seed in range(8)]:
        cache.read(picks)  # which compares every row with its checksum


def test_without_hard_links_the_rows_are_copied(config, copied, longer, encoded, monkeypatch):
    def refuse(*_):
        raise OSError("this file system has none")

    monkeypatch.setattr("os.link", refuse)
    cache = prepare(replace(config, path=str(longer)), "emoji", copied, "cpu")
    assert encoded[1] == ["a new picture"]
    assert len(cache) == 7


def test_a_row_that_is_damaged_is_made_again(config, copied, grown, encoded):
    (latents,) = copied.glob("latents-*")
    file = sorted(latents.glob("0*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1] + b"\x99")
    other = replace(config, path=str(grown))
    cache = prepare(other, "emoji", copied, "cpu")
    assert len(set(encoded[0])) > 1
    for picks in [cache.draw(4, torch.Generator().manual_seed(seed)) for seed in range(8)]:
        cache.read(picks)  # which compares every row with its checksum


def test_another_way_to_encode_takes_nothing_over(config, copied, grown, encoded):
    prepare(replace(config, path=str(grown), flip=True), "emoji", copied, "cpu")
    assert len(set(encoded[0])) > 5
    assert encoded[1] == ["a new picture"]  # captions are encoded as before


def test_prompts_that_are_added_are_painted_alone(tmp_path, monkeypatch):
    """A prompt's number seeds its noise, so that those at the end of the list may be new."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\na pear\n")
    config = DataConfig(prompts=str(prompts), resolution=64, teacher_steps=1)
    prepare(config, "emoji", tmp_path / "cache", "cpu")
    prompts.write_text("a red apple\na pear\na plum\n")
    seeds = []
    from trainer.data import paint

    noise = paint.initial_noise
    monkeypatch.setattr(paint, "initial_noise", lambda given, *args: seeds.extend(given) or noise(given, *args))
    cache = prepare(config, "emoji", tmp_path / "cache", "cpu")
    assert seeds == [2]
    assert len(cache) == 3
