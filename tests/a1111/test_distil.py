"""The "LCM Distil" tab without a web UI: real processes, with a stand-in for the trainer that takes milliseconds."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from extension_a1111 import distil, distil_jobs, distil_python, distil_runner
from extension_a1111.distil import Order, Places, preset_for
from extension_a1111.distil_page import render
from extension_a1111.distil_status import look
from extension_a1111.translation import speaker
from lcm_core.errors import InputError
from lcm_core.files.reading import read_json
from trainer.cli.main import build_parser
from trainer.config import DistillConfig
from trainer.continuing import check_same_run
from trainer.options import resolve, to_dict

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in for Python is a shell script")

TRAINER = """
import json, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
option = lambda name: words[words.index(name) + 1]
out, total = Path(option("--output")), int(option("--steps"))
(out / "run").mkdir(parents=True, exist_ok=True)
log, asked = out / "run" / "log.jsonl", []
(out / "sigint").write_text(str(signal.getsignal(signal.SIGINT) is signal.default_int_handler))
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
done = len(log.read_text().splitlines()) if log.exists() else 0
while done < total and not asked:
    done += 1
    with log.open("a") as file:
        file.write(json.dumps({"step": done, "loss": 1 / done}) + "\\n")
    print(f"\\rtraining: {100 * done // total}%|##  | {done}/{total} [00:01<00:09]", end="", flush=True)
    time.sleep(0.02)
if asked:
    sys.exit(130)
if "--rank" in words and option("--rank") == "13":
    sys.exit("error: rank 13 is unlucky")
(out / f"{option('--name')}_lora.safetensors").write_bytes(b"weights")
end = time.monotonic() + float(option("--scoring") if "--scoring" in words else 0)
while time.monotonic() < end:
    if asked:
        sys.exit(130)
    time.sleep(0.02)
"""


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    """A Python whose trainer is the stand-in; what a failed test leaves running is ended."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nif [ "$2" = trainer ]; then shift 3; exec {sys.executable} {tmp_path}/trainer.py "$@"; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    found = Places(str(python), tmp_path / "runs", tmp_path / "Lora")
    yield found
    for file in found.root.glob("*/job/pids.json"):
        if distil.is_running(found):
            for pid in json.loads(file.read_text()).values():
                os.kill(pid, signal.SIGKILL)


def wait(until: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def trainers(places: Places) -> int:
    """How many stand-ins run, counted from outside."""
    found = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return sum(f"{Path(places.python).parent}/trainer.py" in line for line in found.splitlines())


def test_a_finished_run_puts_its_lora_where_the_host_looks(places: Places) -> None:
    assert distil.start(Order("red", steps=3), places) == "red"
    wait(lambda: look(places).state == "finished")
    status = look(places)
    assert (status.done, status.total, status.lora) == (3, 3, str(places.loras / "red.safetensors"))
    assert (places.loras / "red.safetensors").read_bytes() == b"weights"
    assert status.losses == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_a_lora_is_handed_over_before_it_is_scored(places: Places) -> None:
    """Scoring can take ten times as long as training."""
    distil.start(Order("red", steps=2, more="--scoring 600"), places)
    wait(lambda: (places.loras / "red.safetensors").exists())
    wait(lambda: look(places).lora)
    assert look(places).state == "running"
    assert str(places.loras / "red.safetensors") in render(look(places))
    distil.stop(places)
    wait(lambda: not distil.is_running(places))
    assert look(places).lora == str(places.loras / "red.safetensors")


def test_a_full_disk_is_said_in_one_line(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(distil_runner, "write", write)
    with pytest.raises(InputError, match=r"runs/red cannot be written \(No space left on device\); free some"):
        distil.start(Order("red", steps=1), places)
    assert trainers(places) == 0


@pytest.mark.parametrize(("width", "preset"), [(768, "sd15-lora"), (1024, "sd21-lora"), (2048, "sdxl-lora")], ids=str)
def test_the_preset_follows_the_teacher(places: Places, width: int, preset: str, tmp_path: Path) -> None:
    """Told by the header: the emoji preset's rate and rank would spoil a Stable Diffusion teacher."""
    file = tmp_path / "teacher.safetensors"
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({name: torch.zeros(320, width)}, file)
    order = Order("red", teacher=str(file), data=str(tmp_path))
    words = distil.command(order, places)
    assert words[words.index("--preset") + 1] == order.preset_name == preset
    assert Order("red").preset_name == "emoji"
    assert replace(order, preset="sd15-lora").preset_name == "sd15-lora"


def test_a_teacher_that_no_preset_is_for_is_named(tmp_path: Path) -> None:
    file = tmp_path / "own.safetensors"
    save_file({"model.diffusion_model.x.attn2.to_k.weight": torch.zeros(32, 128)}, file)
    with pytest.raises(InputError, match=r"own\.safetensors has a U-Net that reads text of width 128.* choose one"):
        preset_for(str(file))
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(InputError, match=r"own\.safetensors has no U-Net"):
        preset_for(str(file))


def test_two_clicks_start_one_run(places: Places) -> None:
    distil.start(Order("red", steps=9999), places)
    with pytest.raises(InputError, match="'red' is running already"):
        distil.start(Order("blue"), places)
    # the same from a second web UI that looked a moment too early
    runner = [places.python, distil_runner.__file__, str(places.root / "red" / "job")]
    assert subprocess.run(runner, check=False, timeout=30).returncode == distil_runner.BUSY
    wait(lambda: trainers(places))
    assert trainers(places) == 1
    distil.stop(places)
    wait(lambda: not distil.is_running(places))


def test_stop_saves_and_continue_goes_on_with_the_same_options(places: Places) -> None:
    distil.start(Order("red", steps=40, rank=8), places)
    wait(lambda: len(look(places).losses) > 2)
    assert look(places).state == "running"
    distil.stop(places)
    wait(lambda: look(places).state == "stopped")
    reached = len(look(places).losses)
    assert 2 < reached < 40
    assert not (places.loras / "red.safetensors").exists()
    before = json.loads((places.root / "red" / "job" / "job.json").read_text())["command"]
    assert distil.resume(places) == "red"
    assert look(places).state in ("running", "finished")  # the old wish to stop is forgotten
    wait(lambda: look(places).state == "finished")
    assert [step for step, _ in look(places).losses] == list(range(1, 41))
    assert json.loads((places.root / "red" / "job" / "job.json").read_text())["command"] == before


def test_a_run_goes_on_with_its_own_settings_where_its_preset_has_changed(places: Places) -> None:
    """As after an update: the trainer refuses to go on with other settings than those in the run's folder."""
    file = places.root / "red" / distil.SETTINGS

    def read_command() -> DistillConfig:
        words = json.loads((places.root / "red" / "job" / "job.json").read_text())["command"]
        return resolve(build_parser().parse_args(words[3:]))

    distil.start(Order("red", steps=5), places)
    wait(lambda: not distil.is_running(places))
    begun = read_command()
    kept = replace(begun, student=replace(begun.student, rank=begun.student.rank + 1))
    file.write_text(json.dumps(to_dict(kept)))
    assert distil.resume(places) == "red"
    wait(lambda: not distil.is_running(places))
    check_same_run(read_json(file), to_dict(read_command()), file)
    assert read_command() == kept
    distil.start(Order("red", steps=5), places)  # started anew, it is what the tab says
    wait(lambda: not distil.is_running(places))
    assert read_command() == begun


def test_a_run_outlives_the_host_and_can_still_be_stopped(places: Places) -> None:
    """The web UI that started it is gone, and even its runner was killed: the lock still says that it is alive."""
    code = "import sys; from pathlib import Path; from extension_a1111 import distil\n"
    code += "distil.start(distil.Order('red', steps=9999), distil.Places(sys.argv[1], *map(Path, sys.argv[2:])))"
    words = [sys.executable, "-c", code, places.python, str(places.root), str(places.loras)]
    subprocess.run(words, check=True, cwd=distil_jobs.REPOSITORY, timeout=60)
    assert look(places).state == "running"
    pids = json.loads((places.root / "red" / "job" / "pids.json").read_text())
    os.kill(pids["runner"], signal.SIGKILL)
    time.sleep(0.2)
    assert distil.is_running(places)
    with pytest.raises(InputError, match="running already"):
        distil.start(Order("blue"), places)
    distil.stop(places)
    wait(lambda: not distil.is_running(places))
    assert look(places).state == "interrupted"  # nobody was there to write down how it ended


def test_a_stranger_with_our_process_id_is_not_taken_for_the_run(places: Places) -> None:
    """After a restart of the machine the id may be anybody's: only the lock counts."""
    job = places.root / "red" / "job"
    job.mkdir(parents=True)
    distil_runner.write(places.root / "current.json", {"name": "red"})
    distil_runner.write(job / "pids.json", {"runner": os.getpid(), "trainer": os.getpid()})
    (places.root / "running.lock").touch()
    assert look(places).state == "interrupted"
    with pytest.raises(InputError, match="No distillation is running"):
        distil.stop(places)


def test_a_trainer_can_be_interrupted_also_below_a_web_ui_in_the_background(places: Places) -> None:
    """Shells start background programs with SIGINT ignored, and programs inherit that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        distil.start(Order("red", steps=1), places)
    finally:
        signal.signal(signal.SIGINT, before)
    wait(lambda: not distil.is_running(places))
    assert (places.root / "red" / "sigint").read_text() == "True"


def test_what_the_trainer_complains_of_is_shown(places: Places) -> None:
    distil.start(Order("red", steps=1, rank=13), places)
    wait(lambda: not distil.is_running(places))
    assert look(places).state == "failed"
    assert "The last line of its log: error: rank 13 is unlucky" in render(look(places))


def test_a_lora_folder_that_vanishes_while_training_is_reported(places: Places) -> None:
    distil.start(Order("red", steps=20), places)
    places.loras.rmdir()
    places.loras.write_text("a file")
    wait(lambda: not distil.is_running(places))
    assert re.search(r"could not be copied: .*red_lora\.safetensors .*: \w+", render(look(places)))
    assert re.search(r"[가-힣]: .*red_lora\.safetensors", render(look(places), speaker("ko_KR")))


def test_folders_that_cannot_be_written_are_refused_before_the_start(places: Places) -> None:
    places.loras.write_text("a file")
    with pytest.raises(InputError, match=r"The folder .*Lora cannot be written"):
        distil.start(Order("red"), places)
    assert not places.root.exists()
    assert trainers(places) == 0


def test_a_lora_of_that_name_by_someone_else_is_kept(places: Places) -> None:
    places.loras.mkdir()
    (places.loras / "red.safetensors").write_bytes(b"theirs")
    with pytest.raises(InputError, match="exists already; choose another name"):
        distil.start(Order("red"), places)
    assert (places.loras / "red.safetensors").read_bytes() == b"theirs"


def test_python_without_packages_or_not_there_says_what_to_install(places: Places, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    with pytest.raises(InputError, match=r"lacks torch, diffusers.* -m pip install torch diffusers"):
        distil_python.check_python(str(bare))
    for nothing in ("", str(tmp_path / "none")):
        with pytest.raises(InputError, match=r"Press the button .*python -m venv"):
            distil_python.check_python(nothing)
    distil_python.check_python(sys.executable)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (Order("../up"), "no name for files"),
        (Order("red", teacher="sd.safetensors"), "nothing to learn from"),
        (Order("red", teacher="/no/sd.safetensors", data="."), "/no/sd.safetensors does not exist"),
        (Order("red", more='--note "open'), "cannot be read"),
    ],
)
def test_wrong_orders_are_refused(places: Places, order: Order, message: str) -> None:
    with pytest.raises(InputError, match=message):
        distil.command(order, places)
