"""`trainer cache` as a user runs it, alone or in several processes, and what stops it."""

import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcm_core.errors import InputError
from tests.trainer.cache.conftest import contents
from trainer.cli.main import main
from trainer.data.cache import prepare
from trainer.data.encode import text_maker
from trainer.data.settings import DataConfig
from trainer.data.sources import read_prompts
from trainer.data.teacher import Teacher
from trainer.distributed import Processes


def test_two_processes_write_what_one_writes(config, made, tmp_path):
    """Each makes its own shards; one that finds those of the other missing says so."""
    with pytest.raises(InputError, match="another process made it"):
        prepare(config, "emoji", tmp_path, processes=Processes(rank=1, size=2))
    mine = contents(tmp_path)
    assert {Path(name).name for name in mine} == {"000001.safetensors"}
    prepare(config, "emoji", tmp_path, processes=Processes(rank=0, size=2))
    assert contents(tmp_path) == contents(made[0])


def test_missing_kornia_is_told_before_the_work_not_of_every_picture(config, tmp_path, monkeypatch, no_networks):
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(InputError, match="colour augmentation needs kornia"):
        prepare(replace(config, colour=0.1), "emoji", tmp_path, "cpu")


def test_long_captions_are_told_once(tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{i} {'very ' * 100}long\n" for i in range(3)))
    maker = text_maker(read_prompts(tmp_path / "prompts.txt"), Teacher("emoji"), torch.device("cpu"))
    with pytest.warns(UserWarning, match="too long and lose their ends"):
        maker(range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maker(range(1, 3))


def test_data_without_one_good_picture_is_refused(tmp_path, photos):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(photos / "broken.jpg", data)
    with pytest.raises(InputError, match=r"none of 1 pictures can be used \(first: broken\.jpg"):
        prepare(DataConfig(path=str(data)), "emoji", tmp_path / "cache", "cpu")


def test_a_full_disk_is_named_and_loses_nothing(config, made, tmp_path):
    """A limit on the size of files fails the write of the text, of 77 x 128 halves each, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*text-.*000000.safetensors.*free some space"):
            prepare(config, "emoji", tmp_path, "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = {name: data for name, data in contents(made[0]).items() if re.match(r"latents-\w+/\d|\w+-\w+/keys", name)}
    assert contents(tmp_path) == kept
    assert not list(tmp_path.glob("*/.*"))


def test_a_folder_that_cannot_be_written_is_named_before_the_work(config, tmp_path, no_networks):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*file.*choose another output path"):
        prepare(config, "emoji", tmp_path / "file" / "cache", "cpu")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named_or_read_if_it_is_complete(config, copied, tmp_path):
    for path in [copied, *copied.iterdir()]:
        path.chmod(0o555)
    try:
        assert len(prepare(config, "emoji", copied, "cpu")) == 6
        with pytest.raises(InputError, match="Permission denied"):
            prepare(replace(config, flip=True), "emoji", copied, "cpu")
    finally:
        for path in [copied, *copied.iterdir()]:
            path.chmod(0o755)


SMALL = [*("cache", "--device", "cpu", "--cache-batch", "2"), *("--shard-size", "3", "--resolution", "64")]


def command(*options):
    return main([*SMALL, *map(str, options)])


def test_the_command_fills_the_cache_that_distill_reads(photos, made, tmp_path, capsys):
    assert command("--teacher", "emoji", "--data", photos, "--output", tmp_path / "out") == 0
    assert contents(tmp_path / "out" / "cache") == contents(made[0])
    shown = capsys.readouterr()
    assert "6 pictures of 1 size, 4 captions, 1 skipped" in shown.out
    assert "broken.jpg" in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "x", "--output", "y"], "no teacher was given"),
        (["--teacher", "emoji", "--data", "x"], "no folder was given"),
        (["--teacher", "emoji", "--output", "y"], "neither data nor prompts"),
        (["--teacher", "emoji", "--data", "gone", "--output", "y"], "data gone does not exist"),
        (["--teacher", "gone", "--data", ".", "--output", "y"], "unknown model 'gone'"),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_two_real_processes_share_the_work(photos, made, tmp_path):
    """Started as `accelerate launch` starts them, over gloo."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--teacher", "emoji", "--data", photos, "--cache", tmp_path]
    done = subprocess.run(
        [*launch, "-m", "trainer", *SMALL, *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(made[0])
