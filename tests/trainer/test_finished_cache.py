"""A finished cache as data; which pictures come how often, with which words; damage that is found when it is read."""

import importlib
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import trainer.run
from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from lcm_core.pipeline.model import load_model
from trainer.cli.main import main
from trainer.config import DistillConfig
from trainer.data import batches
from trainer.data.batches import _distinct
from trainer.data.cache import Pick, plan_cache, prepare
from trainer.data.settings import DataConfig
from trainer.data.sources import read_source
from trainer.data.teacher import Teacher, find_teacher
from trainer.data.versions import shuffle_tags
from trainer.distributed import Processes
from trainer.validation import is_scored

ROOT = Path(__file__).parents[2]


def seeded(number=0):
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def made(photos, tmp_path_factory):
    """A finished cache; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, prepare(DataConfig(path=str(photos), shard_size=4, resolution=64), "emoji", folder, "cpu")


def open_finished(folder, teacher="emoji", **settings):
    config = DataConfig(path=str(folder), **settings)
    return plan_cache(config, Teacher(teacher), folder, Processes()).fill(torch.device("cpu"), Processes())


def test_a_finished_cache_gives_the_batches_of_its_pictures_without_them(made, monkeypatch):
    monkeypatch.setattr("trainer.data.cache.open_data", lambda *_: pytest.fail("the pictures were looked for"))
    again = open_finished(made[0])
    expected, found = (cache.batch(4, seeded(1), 0.3) for cache in (made[1], again))
    torch.testing.assert_close(found.latents, expected.latents, rtol=0, atol=0)
    torch.testing.assert_close(found.conditioning, expected.conditioning, rtol=0, atol=0)
    assert (again.buckets, again.skipped, again.notes) == (made[1].buckets, made[1].skipped, made[1].notes)


def test_a_finished_cache_has_captions_to_paint_references_of_a_style_from(made, photos):
    """As a cache that is made of the pictures has."""
    finished, planned = (
        plan_cache(DataConfig(path=str(place)), Teacher("emoji"), made[0], Processes()) for place in (made[0], photos)
    )
    assert finished.captions
    assert set(finished.captions) <= set(planned.captions)


def test_a_run_learns_from_a_finished_cache(made, teachers, tmp_path, capsys, monkeypatch):
    """And is not scored against pictures, for there are none."""
    monkeypatch.setattr(trainer.run, "finish", lambda *_: None)
    words = ["--teacher", teachers(), "--data", made[0], "--output", tmp_path, "--w-min", 1, "--w-max", 1, "--rank", 2]
    words += ["--batch-size", 2, "--steps", 1, "--preview-every", 0, "--no-tensorboard", "--device", "cpu"]
    assert main(["distill", *map(str, words), "--dry-run"]) == 0
    assert "6 pictures of about 64 x 64 pixels" in capsys.readouterr().out
    assert main(["distill", *map(str, words)]) == 0
    assert (tmp_path / "run" / "state.safetensors").exists()
    config = DistillConfig(teacher="x", data=DataConfig(path=str(made[0])))
    assert not is_scored(config, find_teacher(teachers()))


def test_a_cache_of_another_teacher_or_with_other_settings_is_refused(made, teachers):
    other = teachers("v_prediction")
    assert len(open_finished(made[0], other)) == 6  # of the same VAE and text encoder
    with pytest.raises(InputError, match="flip True was given, but the cache was made with False"):
        open_finished(made[0], flip=True)
    cache = open_finished(made[0], null_prompt="zeros")
    assert not cache.batch(2, seeded()).null_conditioning["encoder_hidden_states"].any()


def test_a_cache_of_another_vae_is_refused(made, tmp_path):
    (index,) = made[0].glob("latents-*/index-*.safetensors")
    plan = plan_cache(DataConfig(path=str(index)), Teacher("emoji"), tmp_path, Processes())
    plan.cache.about["made_by"]["vae"] = "another"
    with pytest.raises(InputError, match="made with another vae than that of emoji"):
        plan.fill(torch.device("cpu"), Processes())


def test_damage_that_left_no_trace_is_found_when_it_is_read(photos, tmp_path):
    """A bit that flipped on the disk changes neither size nor time."""
    config = DataConfig(path=str(photos), resolution=64)
    prepare(config, "emoji", tmp_path, "cpu")
    for kind in ("latents", "text"):
        (shard,) = tmp_path.glob(f"{kind}-*/000000.safetensors")
        before, state = shard.read_bytes(), shard.stat()
        end = 8 + int.from_bytes(before[:8], "little")
        first = min(
            entry["data_offsets"][0]
            for name, entry in json.loads(before[8:end]).items()
            if name.startswith(("latents", "encoder"))
        )
        spoilt = bytearray(before)
        spoilt[end + first + 1] ^= 4
        shard.write_bytes(spoilt)
        os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))
        cache = prepare(config, "emoji", tmp_path, "cpu")
        with pytest.raises(InputError, match=rf"{kind}-.*000000.safetensors is damaged; delete it"):
            cache.read([Pick("8x8", 0, False), Pick("8x8", 1, True)])
        shard.write_bytes(before)


def picture(path, value):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), (value, value, value)).save(path)


@pytest.fixture
def folders(tmp_path):
    """Two folders that say something of their pictures, and one that does not."""
    root = tmp_path / "data"
    root.mkdir()
    for folder, value in (("3_a cat", 10), ("dogs", 90), ("others", 200)):
        picture(root / folder / "1.png", value)
        picture(root / folder / "2.png", value + 20)
    (root / "dogs" / "folder.json").write_text('{"repeats": 2, "caption": "a dog"}')
    (root / "dogs" / "2.txt").write_text("two dogs")
    return root


def test_folders_say_how_often_their_pictures_come_and_what_is_on_them(folders):
    said = [(item.key, item.caption, item.repeats) for item in read_source(folders, folder_names=True).items]
    assert said == [
        ("3_a cat/1.png", "a cat", 3),
        ("3_a cat/2.png", "a cat", 3),
        ("dogs/1.png", "a dog", 2),
        ("dogs/2.png", "two dogs", 2),
        ("others/1.png", "", 1),
        ("others/2.png", "", 1),
    ]
    assert read_source(folders).items[0].repeats == 1  # names mean nothing unless it is said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"repeats": 0}', "repeats 0 is out of range; use 1 to 1000"),
        ('{"repeats": true}', "repeats True is out of range"),
        ('{"repeat": 2}', "unknown setting 'repeat'; it may have repeats and caption"),
        ("[]", "folder.json"),
        ('{"caption": 3}', "the caption is int, not text"),
    ],
)
def test_a_wrong_folder_file_is_named(folders, text, message):
    (folders / "dogs" / "folder.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_source(folders)


def test_repeated_pictures_come_as_often_as_was_said(folders, tmp_path):
    cache = prepare(DataConfig(path=str(folders), folder_names=True, resolution=64), "emoji", tmp_path / "cache", "cpu")
    assert cache.buckets == {"8x8": 12}
    batch = cache.read([Pick("8x8", row, False) for row in range(12)])
    counts = Counter(float(latents.sum()) for latents in batch.latents)
    assert sorted(counts.values()) == [1, 1, 2, 2, 3, 3]


def test_pictures_that_are_held_out_are_never_learnt_from(photos, tmp_path):
    config = DataConfig(path=str(photos), holdout=2)
    cache = prepare(config, "emoji", tmp_path, "cpu")
    assert len(cache) == 4
    (picks,) = cache.held_out(8)
    held = {float(latents.sum()) for latents in cache.read(picks).latents}
    seen = {float(latents.sum()) for seed in range(9) for latents in cache.batch(4, seeded(seed)).latents}
    assert (len(held), len(seen), len(held & seen)) == (2, 4, 0)
    with pytest.raises(InputError, match="holdout 6 leaves no picture to learn from"):
        prepare(replace(config, holdout=9), "emoji", tmp_path, "cpu")


def test_captions_come_in_versions_with_their_tags_in_other_orders(tmp_path):
    picture(tmp_path / "data" / "1.png", 50)
    (tmp_path / "data" / "1.txt").write_text("cat, red, small, old")
    config = DataConfig(path=str(tmp_path / "data"), caption_versions=3, keep_tags=1, resolution=64)
    cache = prepare(config, "emoji", tmp_path / "cache", "cpu")
    drawn = [cache.draw(1, seeded(seed))[0] for seed in range(30)]
    assert {pick.version for pick in drawn} == {0, 1, 2}
    model = load_model("emoji", "cpu")
    for version in range(3):
        words = shuffle_tags("cat, red, small, old", version, 1)
        expected = model.encode([words], 64, 64)["encoder_hidden_states"].half().float()
        found = cache.read([Pick("8x8", 0, False, version)]).conditioning["encoder_hidden_states"]
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    nothing = cache.read([Pick("8x8", 0, True, 2)])  # a dropped caption is the empty one in every version
    torch.testing.assert_close(nothing.conditioning, nothing.null_conditioning, rtol=0, atol=0)


def test_shuffled_tags_are_the_same_tags_behind_those_that_stay():
    versions = [shuffle_tags("a, b, c, d, e", number, 2) for number in range(20)]
    assert versions[0] == "a, b, c, d, e"
    assert all(sorted(words.split(", ")) == list("abcde") and words.startswith("a, b, ") for words in versions)
    assert len(set(versions)) > 3
    assert shuffle_tags("a, b", 1, 2) == "a, b"


@pytest.mark.parametrize(("count", "size"), [(10**12, 4096), (70_000, 17_000), (5, 12)])
def test_rows_are_drawn_without_a_table_of_all(count, size):
    rows = _distinct(count, size, seeded())
    times = Counter(rows).values()
    assert len(rows) == size
    assert all(0 <= row < count for row in rows)
    assert max(times) - min(times) <= 1
    assert max(times) == -(-size // count)


def test_as_many_shards_are_opened_as_a_batch_needs(tmp_path, monkeypatch):
    """However many there are. Seconds say nothing on a busy machine; benchmarks/cache_start.py has them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cache_start = importlib.import_module("cache_start")
    opened = []
    monkeypatch.setattr(batches, "read_safetensors", lambda path: opened.append(path) or read_safetensors(path))
    monkeypatch.setattr(cache_start, "BATCHES", 1)
    cache_start.make(tmp_path / "cache", 10_000)
    assert len(list(tmp_path.glob("cache/*/0*.safetensors"))) == 158
    assert cache_start.start(tmp_path / "cache")["pictures"] == 10_000
    assert len(opened) <= 2 * (2 * cache_start.BATCH_SIZE + 1)  # of each sample the latents and the text; the empty one
