"""Around a run in the tab "LCM Distil": its plan, its Python, what is shown at its end."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from extension_a1111 import distil, distil_python, distil_runner, distil_setup
from extension_a1111.distil import Order, Places
from extension_a1111.distil_page import described, mistake, render
from extension_a1111.distil_status import Status, look
from extension_a1111.translation import speaker
from lcm_core.errors import InputError
from trainer import estimate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(sys.executable, tmp_path / "runs", tmp_path / "Lora")


def write_run(places: Places, name: str = "red") -> Path:
    """A run that has ended and handed over its LoRA."""
    run = places.root / name
    (run / distil.JOB).mkdir(parents=True)
    places.loras.mkdir()
    lora = places.loras / f"{name}.safetensors"
    lora.write_bytes(b"weights")
    ended = {"code": 0, "stopped": False, "lora": str(lora), "error": None}
    distil_runner.write(run / distil.JOB / "exit.json", ended)
    distil_runner.write(places.root / "current.json", {"name": name})
    return run


def test_a_plan_is_read_as_the_trainer_prints_it() -> None:
    """Memory, disk and time; without a measured time nothing is made up."""
    plan = estimate.Plan(
        {"a": 3 * 2**30, "b": 2**29}, 2**30, {"cache": 2**28}, {}, {"caching": 60.0, "training": 660.0}
    )
    assert distil.read_plan("emoji", estimate.to_text(plan)) == distil.Plan("emoji", "3.50 GiB", "256 MiB", "12 min")
    for unknown in ({"training": None}, {"training": None, "scoring": 0.0}):
        plan.seconds = unknown
        assert distil.read_plan("emoji", estimate.to_text(plan)).time == ""
    assert "nothing like it was measured yet" in described(distil.Plan("emoji", "1 GiB", "1 MiB", ""))


def test_the_real_trainer_makes_a_plan_and_writes_nothing(places: Places) -> None:
    plan = distil.plan(Order("red", steps=3, batch_size=1, is_scored=False, more="--device cpu"), places)
    assert plan.preset == "emoji"
    assert re.fullmatch(r"[0-9.]+ (MiB|GiB)", plan.memory)
    assert re.fullmatch(r"[0-9.]+ (MiB|GiB)", plan.disk)
    assert not places.root.exists()
    with pytest.raises(InputError, match="steps"):
        distil.plan(Order("red", more="--steps -5"), places)


@pytest.mark.slow
def test_the_real_lora_is_there_seconds_after_the_last_step(places: Places, tmp_path: Path) -> None:
    """Before pictures, scores, card and report are made."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "data" / "red.png")
    (tmp_path / "data" / "red.txt").write_text("a red square")
    order = Order("red", data=str(tmp_path / "data"), steps=2, batch_size=1, is_scored=False, more="--device cpu")
    distil.start(order, places)
    lora, deadline = places.loras / "red.safetensors", time.monotonic() + 600
    while not lora.exists():
        assert time.monotonic() < deadline, look(places).message
        time.sleep(0.05)
    seconds = lora.stat().st_mtime - (places.root / "red" / "run" / "log.jsonl").stat().st_mtime
    print(f"LoRA {seconds:.1f} s after the last step")
    assert look(places).state == "running"
    assert seconds < 5
    distil.stop(places)
    while distil.is_running(places):
        time.sleep(0.1)


def test_scores_are_a_choice(places: Places) -> None:
    assert distil.command(Order("red", is_scored=False), places)[-2:] == ["--samples", "0"]
    assert "--samples" not in distil.command(Order("red"), places)


@pytest.mark.parametrize(
    ("version", "index", "words"),
    [
        ("2.9.0", "https://host/whl/cu128", ["torch==2.9.0"]),
        (
            "2.9.0+cu128",
            "https://host/whl/cu130/",
            ["torch==2.9.0+cu128", "--extra-index-url", "https://host/whl/cu128"],
        ),
        ("2.9.0+cpu", "https://host/whl/cu130", ["torch==2.9.0+cpu", "--extra-index-url", "https://host/whl/cpu"]),
        ("2.9.0+cu128", "", ["torch==2.9.0"]),
        ("2.1.2+cu121", "https://host/whl/cu121", ["torch>=2.4", "--extra-index-url", "https://host/whl/cu121"]),
        ("2.3.1", "", ["torch>=2.4"]),
    ],
)
def test_the_trainers_torch_is_the_web_uis(version: str, index: str, words: list[str]) -> None:
    """The same version and build; A1111's and Forge's own pins are too old for the trainer."""
    assert distil_setup.torch_words(version, index) == words


def test_making_the_python_says_how_far_it_is_and_stops_at_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def run(words: list[str], **_: object) -> object:
        asked.append(words)
        return subprocess.CompletedProcess(words, 7 if len(asked) == 3 else 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert distil_setup.main(tmp_path / "venv", ["torch==2.9.0"]) == 7
    assert asked[0] == [sys.executable, "-m", "venv", str(tmp_path / "venv")]
    assert asked[1][-1] == "torch==2.9.0"
    assert asked[2][-1] == f"{ROOT}[train]"
    assert (tmp_path / "constraints.txt").read_text() == "torch==2.9.0\n"  # kept while the others are fetched
    assert [line.partition(":")[0] for line in capfd.readouterr().out.splitlines()] == ["venv", "torch", "trainer"]


def test_a_python_counts_when_it_is_whole(tmp_path: Path) -> None:
    job = tmp_path / distil_python.SETUP
    job.mkdir()
    distil_runner.write(job / "exit.json", {"code": 1})
    (job / "run.log").write_text("torch: 33%|#| 1/3 [torch]\nERROR: No space left on device\n")
    assert distil_python.made_python(tmp_path) == ""
    failed = look(Places("", tmp_path, tmp_path))
    assert (failed.state, failed.message) == ("failed", "ERROR: No space left on device")
    assert look(Places(sys.executable, tmp_path, tmp_path)).state == "none"  # another is named in the settings
    distil_runner.write(job / "exit.json", {"code": 0})
    assert distil_python.made_python(tmp_path).startswith(str(job / "venv"))


def test_what_is_being_fetched_is_shown(tmp_path: Path) -> None:
    job = tmp_path / distil_python.SETUP
    job.mkdir()
    (job / "run.log").write_text(
        "torch: 33%|#| 1/3 [torch]\nCollecting torch\n  Downloading https://x/a/torch-2.whl (9 MB)\n"
    )
    lock = distil_runner.take_lock(job / "running.lock")
    assert lock is not None
    status = look(Places("", tmp_path, tmp_path))
    lock.close()
    assert (status.state, status.done, status.total, status.details) == ("making", 1, 3, "torch-2.whl")
    assert "torch 1 of 3 (torch-2.whl)" in render(status)


def test_what_the_trainer_counts_is_said_in_the_language_of_the_page() -> None:
    """Its own log is English."""
    counted = {"done": 2, "total": 9, "details": "00:01<00:09, 3.1it/s, loss 0.1234, 5.2 images/s, peak 1.50 GB"}
    pages = [
        render(Status("running", "red", label=label, **counted), speaker("ko_KR")) for label in ("run", "caching text")
    ]
    for page in pages:
        assert "손실 0.1234, 초당 5.2장, 최대 1.50 GB" in page
        assert not re.search(r"loss|images|peak|caching", page)


def test_the_end_shows_25_steps_of_the_teacher_beside_4_of_the_student(places: Places) -> None:
    run = write_run(places)
    for name in ("teacher-25-000", "student-04-000", "teacher-25-001", "student-04-001", "student-08-000"):
        (run / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (400, 400), "red").save(run / "samples" / f"{name}.png")
    (run / "report.html").write_text("report")
    status = look(places)
    assert [[file.stem for file in pair] for pair in status.pairs] == [
        ["teacher-25-000", "student-04-000"],
        ["teacher-25-001", "student-04-001"],
    ]
    assert status.report == run / "report.html"
    page = render(status, report="file=/r.html")
    assert "Teacher with 25 steps, student with 4 steps" in page
    assert page.count("<img") == 4
    assert 'href="file=/r.html"' in page
    assert len(page) < 20_000  # small pictures: the page is sent again with every change


def test_previews_are_columns_from_the_first_step_to_the_last(places: Places) -> None:
    run = write_run(places)
    (run / "previews").mkdir()
    for step in range(10, 210, 10):
        Image.new("RGB", (64, 400), "red").save(run / "previews" / f"step-{step:06d}.png")
    page = render(look(places))
    assert [int(step) for step in re.findall(r"<div>step (\d+)<img", page)] == [10, 40, 80, 120, 160, 200]


def test_a_lora_that_was_moved_away_is_not_offered(places: Places) -> None:
    write_run(places)
    assert look(places).lora
    (places.loras / "red.safetensors").unlink()
    assert look(places).lora == ""


def test_errors_look_like_errors() -> None:
    for page in (mistake("<b>no</b>"), render(Status("failed", "red", message="<b>no</b>"))):
        assert 'role="alert"' in page
        assert "#dc2626" in page
        assert "&lt;b&gt;no" in page
    assert 'role="alert"' not in render(Status("finished", "red"))


def test_settings_of_the_sampler_come_before_paths() -> None:
    """One file adds them all, in the order in which the page of settings shows them."""
    folder = ROOT / "extension_a1111" / "scripts"
    assert "add_option" not in (folder / "lcm_distil_tab.py").read_text(encoding="utf-8")
    rows = [
        node.elts[0].value
        for node in ast.walk(ast.parse((folder / "lcm_sampler.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Tuple) and len(node.elts) == 5 and isinstance(node.elts[0], ast.Constant)
    ]
    assert rows[-2:] == ["lcm_suite_distil_python", "lcm_suite_distil_folder"]
    assert not any("distil" in str(name) for name in rows[:-2])


def test_old_orders_can_be_continued(places: Places) -> None:
    """A run that was started before a field was there."""
    order = {name: value for name, value in Order("red").__dict__.items() if name != "is_scored"}
    assert Order(**json.loads(json.dumps(order))).is_scored
