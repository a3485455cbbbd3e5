"""What a mistake on the command line costs: one line, exit code 2, and no file more than before."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lcm_core.cli.main import main
from lcm_core.pipeline.image import save_image
from tests.core.cli.conftest import CPU, files, shell


def _fails(argv: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line on stderr with these words, and no file more than before."""
    before = files()
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as stop:  # argparse's way
        code = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if "step" not in line or "error" in line]
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert files() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output", "a.png"], ("no prompt", "--from")),
        (["a", "cat"], ("unrecognized arguments: cat", "quotes")),
        (["a", "--size", "big"], ("--size", "WIDTHxHEIGHT")),
        (["a", "--size", "100x64"], ("100x64", "multiples of 64", "128x64")),
        (["a", "--size", "0"], ("0x0",)),
        (["a", "--size=-64x64"], ("-64x64",)),
        (["a", "--size", "99999999"], ("99999999",)),
        (["a", "--size", "8192"], ("8192x8192", "too large")),
        (["a", "--steps", "0"], ("0 steps", "1 to 50")),
        (["a", "--steps", "51"], ("51 steps", "original_steps")),
        (["a", "--strength", "0.5"], ("strength", "input image")),
        (["a", "--count", "0"], ("--count 0",)),
        (["a", "--sampler", "heun"], ("heun", "dpmpp_2m")),
        (["a", "--image", "absent.png"], ("absent.png", "does not exist")),
        (["a", "--output", "a.tiff"], ("a.tiff", ".png")),
        (["a", "--device", "abacus"], ("abacus", "cpu")),
        (["a", "--dtype", "int3"], ("int3", "float32")),
        (["--from", "absent.png"], ("absent.png", "does not exist")),
        (["a", "--lora", "absent.safetensors"], ("absent.safetensors", "lcm_lora")),
    ],
)
def test_a_mistake_costs_one_line(
    emoji: str, options: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    _fails(["generate", "--model", emoji, *options], words, capsys)


def test_strength_out_of_range(emoji: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64)).save("in.png")
    for value in ("0", "1.5", "nan"):
        argv = ["generate", "a", "--model", emoji, "--image", "in.png", "--strength", value]
        _fails(argv, ("strength", "(0, 1]"), capsys)


def test_broken_model_files(emoji: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", emoji, "--to", "single-file", "--path", "whole.safetensors"]) == 0
    whole = Path("whole.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("random.safetensors").write_bytes(os.urandom(5000))
    torch.save({"a": torch.zeros(1)}, "model.ckpt")
    weights = load_file("whole.safetensors")
    save_file({"x": torch.zeros(3)}, "strange.safetensors")
    weights["model.diffusion_model.out.2.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, "nan.safetensors")
    Path("tokenizer").symlink_to(Path(emoji) / "tokenizer")
    for name, words in {
        "no-such-model": ("unknown model", "whole.safetensors"),
        "cut.safetensors": ("truncated",),
        "random.safetensors": ("not a safetensors file",),
        "model.ckpt": ("pickle", "convert"),
        "strange.safetensors": ("unknown architecture",),
        "nan.safetensors": ("NaN", "conv_out.weight"),
    }.items():
        _fails(["generate", "a", "--model", name, "--output", "a.png"], (name, *words), capsys)
        if name != "nan.safetensors":
            _fails(["info", name], (name, *words), capsys)


def test_loras_that_do_not_fit(emoji: str, wide_lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x": torch.zeros(3)}, "strange.safetensors")
    for name in (str(wide_lora), "strange.safetensors"):
        argv = ["generate", "a", "--model", emoji, "--unet", "teacher", "--lora", name, "--output", "a.png"]
        _fails(argv, (name,), capsys)


def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    emoji: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("")
    Path("folder.png").mkdir()
    Path("full").mkdir()
    Path("full/old.png").write_text("")
    # A model that does not exist would be found first if the output were checked after loading.
    _fails(
        ["generate", "a", "--model", "none", "--output", "file/a.png"], ("file/a.png", "another output path"), capsys
    )
    _fails(["compare", "a", "--model", "none", "--output", "folder.png"], ("folder.png", "folder"), capsys)
    travel = ["interpolate", "--from", "a", "--to", "b", "--model", "none", "--output"]
    _fails([*travel, "full"], ("full", "exists already"), capsys)
    _fails([*travel, "a.avi"], (".avi", ".mp4"), capsys)
    _fails([*travel, "a.gif", "--frames", "0"], ("0 frames",), capsys)
    _fails([*travel, "a.gif", "--ease", "bouncy"], ("bouncy", "smooth"), capsys)
    _fails(["export", "--to", "diffusers", "--model", emoji, "--path", "full"], ("full", "exists already"), capsys)
    _fails(["export", "--to", "single-file", "--model", emoji, "--path", "x.png"], ("x.png", ".safetensors"), capsys)


def test_a_picture_whose_settings_were_tampered_with(emoji: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"prompt": "a", "model": emoji, "num_inference_steps": "four"}
    save_image(Image.new("RGB", (8, 8)), "odd.png", settings)
    _fails(["generate", "--from", "odd.png"], ("num_inference_steps='four'", "wrong type"), capsys)
    save_image(Image.new("RGB", (8, 8)), "grid.png", {"command": "compare"})
    _fails(["generate", "--from", "grid.png"], ("grid.png", "`generate`"), capsys)


def test_a_travel_without_an_end(emoji: str, capsys: pytest.CaptureFixture[str]) -> None:
    _fails(["interpolate", "--model", emoji, "--from", "a"], ("--to",), capsys)
    _fails(["interpolate", "--model", emoji, "--keyframe", "a"], ("two or more",), capsys)
    _fails(["interpolate", "--model", emoji], ("--from",), capsys)


def test_a_full_disk_is_one_line_and_leaves_nothing(emoji: str) -> None:
    """In a process whose files may not grow beyond a kilobyte, as on a disk without room."""
    resource = pytest.importorskip("resource")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    argv = ["generate", "a", "--model", emoji, "--steps", "1", "--output", "a.png", *CPU]
    process = shell("-m", "lcm_core", *argv, preexec_fn=limit)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: cannot write a.png: ")
    assert files() == []


def test_ctrl_c_ends_with_one_line_and_leaves_nothing(emoji: str) -> None:
    argv = ["generate", "a", "--model", emoji, "--steps", "50", "--count", "50", "--output", "many", *CPU]
    # A test run in the background hands down SIGINT as ignored; at a user's prompt it is not.
    process = shell("-m", "lcm_core", *argv, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stderr is not None
    text = " "
    while "/2500" not in text:
        letter = process.stderr.read(1)
        assert letter, text  # ended by itself
        text += letter
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in text + errors
    assert errors.splitlines()[-1] == "interrupted; nothing was left half-written"
    assert files() == []
