"""A cache of tars in a store: what one of the same tars on the disk is, each read once and by one process."""

import uuid
from dataclasses import replace

import fsspec
import pytest
import torch

from lcm_core.errors import InputError
from trainer.cli.main import main
from trainer.data import cache as caches
from trainer.data import streams
from trainer.data.cache import prepare
from trainer.data.settings import DataConfig
from trainer.data.teacher import Teacher
from trainer.distributed import Processes

from ..test_data_sources import picture, tar_of

COLOURS = [(number * 40, 255 - number * 40, 90) for number in range(6)]


def tar(numbers):
    files = {}
    for number in numbers:
        files |= {f"{number}.png": picture(COLOURS[number], (64, 64)), f"{number}.txt": f"picture number {number}"}
    return tar_of({**files, f"lone{numbers[0]}.txt": "no picture"})


def put(address, data):
    with fsspec.open(address, "wb") as stream:
        stream.write(data)


@pytest.fixture
def store():
    """Two tars in memory: their address, and a third's."""
    address = f"memory://{uuid.uuid4().hex}"
    put(f"{address}/0.tar", tar([0, 1, 2]))
    put(f"{address}/1.tar", tar([3, 4]))
    return address


@pytest.fixture
def read(monkeypatch):
    """The names of the tars that are read."""
    names = []

    class Watched(streams.RemoteStream):
        def __init__(self, tar):
            names.append(tar.name)
            super().__init__(tar)

    monkeypatch.setattr(streams, "RemoteStream", Watched)
    return names


def settings(path, **others):
    return DataConfig(path=str(path), resolution=64, **others)


def batches(cache):
    """All that it holds, in the order of its captions."""
    (bucket,) = cache.buckets
    batch = cache.read([caches.Pick(bucket, row, False) for row in range(len(cache))])
    return batch.latents, batch.conditioning


def test_it_holds_what_one_of_the_same_tars_on_the_disk_holds(store, tmp_path, read):
    local = tmp_path / "data"
    local.mkdir()
    for number, numbers in enumerate(([0, 1, 2], [3, 4])):
        (local / f"{number}.tar").write_bytes(tar(numbers))
    streamed = prepare(settings(f"{store}/{{0..1}}.tar", holdout=1), "emoji", tmp_path / "streamed", "cpu")
    expected = prepare(settings(local, holdout=1), "emoji", tmp_path / "local", "cpu")
    assert read == ["0.tar", "1.tar"]
    torch.testing.assert_close(batches(streamed), batches(expected), rtol=0, atol=2e-3)
    assert streamed.caption_count == expected.caption_count == 5
    assert sorted(streamed.skipped) == sorted(expected.skipped)
    assert len(streamed.skipped) == 2
    again = prepare(settings(f"{store}/*.tar", holdout=1), "emoji", tmp_path / "streamed", "cpu")
    torch.testing.assert_close(batches(again), batches(streamed), rtol=0, atol=0)
    assert read == ["0.tar", "1.tar"], "nothing has changed"


def test_only_tars_that_are_new_or_changed_are_read(store, tmp_path, read):
    whole = settings(f"{store}/*.tar")
    prepare(whole, "emoji", tmp_path, "cpu")
    put(f"{store}/00.tar", tar([5]))  # in front of the others
    put(f"{store}/1.tar", tar([4]))
    read.clear()
    cache = prepare(whole, "emoji", tmp_path, "cpu")
    assert read == ["00.tar", "1.tar"]
    anew = prepare(whole, "emoji", tmp_path / "anew", "cpu")
    torch.testing.assert_close(batches(cache), batches(anew), rtol=0, atol=2e-3)
    assert len(cache) == 5


def test_each_process_reads_its_own_tars(store, tmp_path, read):
    config = settings(f"{store}/*.tar")
    with pytest.raises(InputError, match="is missing though another process made it"):
        prepare(config, "emoji", tmp_path, "cpu", Alone(rank=1, size=2))
    assert read == ["1.tar"]
    assert len(prepare(config, "emoji", tmp_path, "cpu", Alone(rank=0, size=2))) == 5
    assert read == ["1.tar", "0.tar"]


class Alone(Processes):
    """One of several processes, which waits for none."""

    def wait(self):
        pass


def test_labels_are_read_and_missed(store, tmp_path):
    with pytest.raises(InputError, match="has no labels 'cls'"):
        prepare(settings(f"{store}/*.tar", labels="cls"), "emoji", tmp_path, "cpu")
    with pytest.raises(InputError, match="control_pictures go with pictures on this machine"):
        replace(settings(f"{store}/*.tar"), control_pictures=str(tmp_path)).check()


def test_a_plan_reads_no_tar_and_names_them(store, tmp_path, read, capsys):
    words = ["--data", f"{store}/*.tar", "--output", str(tmp_path / "out"), "--resolution", "64", "--device", "cpu"]
    assert main(["distill", "--teacher", "emoji", *words, "--steps", "1", "--dry-run"]) == 0
    assert "2 tars, " in capsys.readouterr().out
    assert read == []


def test_its_hashes_change_with_its_tars(store, tmp_path):
    def hashes():
        plan = caches.plan_cache(settings(f"{store}/*.tar"), Teacher("emoji"), tmp_path, Processes())
        return plan.hash_pictures(), plan.hash_captions()

    before = hashes()
    assert hashes() == before
    put(f"{store}/1.tar", tar([4]))
    assert not set(hashes()) & set(before)
