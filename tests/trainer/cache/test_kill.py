"""SIGKILL while the cache is made: nothing cut short under its final name, and the finished cache is as without."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lcm_core.files.safetensors import check_file
from tests.trainer.cache.conftest import parse

SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path

import diffusers.models.autoencoders.autoencoder_kl  # loaded once, before the forks
import transformers
from lcm_core.files.safetensors import check_file
from trainer.data.cache import prepare
from trainer.data.settings import DataConfig

data, root, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
folder = root / "killed"
config = DataConfig(path=str(data), shard_size=1, flip=True)
dice = random.Random(kills)


def files():
    return [path for path in folder.rglob("*") if path.is_file()]


def start(folder):
    child = os.fork()
    if child == 0:
        prepare(config, "emoji", folder, "cpu")
        os._exit(0)
    return child


def kill_once():
    child = start(folder)
    # at a random moment of a random write: once that many files are there, be they whole or temporary
    target = len(files()) + dice.randint(1, 4)
    while len(files()) < target and os.waitpid(child, os.WNOHANG) == (0, 0):
        pass
    time.sleep(dice.random() * 0.004)
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        return
    whole = [path for path in files() if path.suffix == ".safetensors" and not path.name.startswith(".")]
    for path in whole:
        check_file(path)  # raises on a file that was cut short
    print(len(whole), flush=True)


assert os.waitpid(start(root / "whole"), 0)[1] == 0
for _ in range(kills):
    kill_once()
prepare(config, "emoji", folder, "cpu")
"""


def files(folder):
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def make_pictures(root, count):
    root.mkdir()
    numbers = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(numbers.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"picture number {i}")
    return root


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("kills", "pictures"), [(3, 8), pytest.param(20, 36, marks=pytest.mark.slow)])
def test_a_killed_cache_is_finished_bit_for_bit(tmp_path, kills, pictures):
    script = tmp_path / "fill.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, make_pictures(tmp_path / "data", pictures), tmp_path, str(kills)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    shards = [int(line) for line in done.stdout.split()]  # that were there after each kill
    assert len(shards) == kills
    assert max(shards) < 2 * pictures + 1, "a kill came too late, when all was done"
    whole, killed = files(tmp_path / "whole"), files(tmp_path / "killed")
    leftovers = {name for name in killed if os.path.basename(name).startswith(".")}
    assert killed.keys() - leftovers == whole.keys()
    for name, path in whole.items():
        if path.suffix == ".safetensors":
            check_file(path)
            assert parse(killed[name]) == parse(path), name
        elif path.name not in ("speed.json", "checked.json"):  # of seconds and times, which differ
            json.loads(path.read_text())
            assert killed[name].read_bytes() == path.read_bytes(), name
