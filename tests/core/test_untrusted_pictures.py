"""Pictures, settings and words from outside: checked before they choose files, memory or threads."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lcm_core.cli.main import main, run_command
from lcm_core.errors import InputError
from lcm_core.networks.device import choose_device, choose_dtype
from lcm_core.pipeline.image import encode_image, open_image, read_settings, save_image
from lcm_core.pipeline.options import parse_options
from lcm_core.pipeline.settings import Settings
from tests.core.test_untrusted import POSIX
from trainer.cli.main import main as trainer_main


@pytest.mark.parametrize(
    "values",
    [{"timesteps": ["a"]}, {"timesteps": [1.5]}, {"timesteps": 3}, {"seed": 1.0}, {"width": True}, {"prompt": 3}],
    ids=str,
)
def test_setting_of_a_picture_has_the_wrong_type(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="has the wrong type"):
        parse_options(values)


@pytest.mark.parametrize("values", [{"prompt": "a\0"}, {"prompt": "\ud800"}, {"seed": 2**64}, {"upscale": 10**400}])
def test_setting_is_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Settings(**values).check()


def picture(path: Path, **settings: Any) -> str:
    save_image(Image.new("RGB", (8, 8)), path, settings)
    return str(path)


def test_missing_size_is_another_model_s(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture of another program may say no more than a prompt: size, sampler and steps are the model's then."""
    model = str(models / "emoji")
    argv = ["generate", "--from", picture(tmp_path / "a.png", prompt="a", model=model, threads=10**6)]
    before = torch.get_num_threads()
    assert main([*argv, "--output", str(tmp_path / "b.png")]) == 0
    assert Image.open(tmp_path / "b.png").size == (64, 64)
    assert torch.get_num_threads() == before
    errors = capsys.readouterr().err
    assert f"a.png uses model '{model}'" in errors  # whoever made the picture chose what is opened
    assert "painted with 1000000 threads, here are" in errors


@POSIX
def test_picture_makes_us_read_a_device(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model", "vae", "image", "tokenizer"):
        file = picture(tmp_path / "a.png", prompt="a", **{"model": str(models / "emoji"), name: "/dev/zero"})
        assert main(["generate", "--from", file, "--output", str(tmp_path / "b.png")]) == 2
        assert "/dev/zero" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


def test_picture_runs_another_program(tmp_path: Path) -> None:
    """Pillow would hand a PostScript file to Ghostscript."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="as a picture"):
        open_image(tmp_path / "a.png")


# --- words, names and terminals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminal_without_the_letters_ends_in_an_error(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = picture(tmp_path / "a.png", prompt="猫")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["info", file]) == 0
    out.seek(0)
    assert out.read().startswith("prompt: \\u732b")


def test_picture_sends_commands_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", picture(tmp_path / "a.png", prompt="caf\u00e9 \x1b]0;title\x07")]) == 0
    assert capsys.readouterr().out == "prompt: caf\u00e9 \\x1b]0;title\\x07\n"


def test_complaint_about_half_a_character_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["info", "no\udcffmodel"]) == 2
    err.seek(0)
    assert "no\\udcffmodel" in err.read()


def test_name_that_is_no_text_spoils_the_picture(tmp_path: Path) -> None:
    """On Linux a path may hold bytes that are no UTF-8."""
    for suffix in (".png", ".jpg"):
        (tmp_path / f"a{suffix}").write_bytes(
            encode_image(Image.new("RGB", (8, 8)), suffix, {"prompt": "a", "model": "no\udcffmodel"})
        )
        assert read_settings(tmp_path / f"a{suffix}") == {"prompt": "a", "model": "no?model"}


def test_what_no_file_can_hold_is_found_after_painting(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lcm_core.pipeline.pipeline.paint", lambda *_: pytest.fail("painted in vain"))
    monkeypatch.chdir(tmp_path)
    argv = ["generate", "--model", str(models / "emoji"), "--output"]
    cases = (
        ([*argv, "a.jpg", "a" * 66_000], "too long to be stored in a.jpg"),
        ([*argv, "a.png", "a" * 2**20], "too long to be stored in a.png"),
        ([*argv, "a" * 300 + ".png", "a"], "more than 255 bytes"),
        ([*argv, "a" * 300 + "/a.png", "a"], "more than 255 bytes"),
        ([*argv, "a.png", "a\udcff"], "is no valid text"),
        (["generate", "a", "--model", "m" * 300], "cannot use mmm"),
        ([*argv, ".png", "a"], "has no name before .png"),
    )
    for command, words in cases:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert words in error.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_picture_of_too_many_pixels_fills_the_memory(tmp_path: Path) -> None:
    Image.new("1", (20_000, 6_000)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="has 20000x6000 pixels; make it smaller"):
        open_image(tmp_path / "a.png")


def test_numbers_that_end_in_an_error_later(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "a", "--model", str(models / "emoji"), "--output", "never.png"]
    for options in (["--count", "1000000000"], ["--seed", str(2**64 - 1), "--count", "2"], ["--seed", "9" * 30]):
        assert main([*argv, *options]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert main([*argv, "--timesteps", "9" * 30]) == 2
    assert not Path("never.png").exists()


def test_abbreviation_is_taken_for_another_option(capsys: pytest.CaptureFixture[str]) -> None:
    ours = [(main, argv) for argv in (["generate", "a", "--n", "2"], ["export", "--pa", "x"], ["--vers"])]
    theirs = (
        ["distill", "--step", "2"],
        ["cache", "--dat", "x"],
        ["eval", "--n", "2"],
        ["recipe", "emoji", "--out", "x"],
    )
    for run, argv in [*ours, *((trainer_main, argv) for argv in theirs)]:
        with pytest.raises(SystemExit) as stop:
            run(argv)
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(("options", "noted"), [(["--size", "128"], True), (["--upscale", "2"], True), ([], False)])
def test_size_far_from_the_model_s_is_not_noted(
    options: list[str], noted: bool, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "a", "--model", str(models / "emoji"), "--steps", "1", "--output", str(tmp_path / "a.png")]
    assert main([*argv, *options]) == 0
    assert ("was trained at 64x64 pixels" in capsys.readouterr().err) == noted


# --- devices and number formats ---------------------------------------------------------------------------------------


def test_card_without_bfloat16_emulates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says yes for cards before Ampere too, and emulates; float16 is what these are quick at."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_dtype("cuda") == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # torch 2.1 does not know the word
    assert choose_dtype("cuda") == torch.bfloat16


def test_gpu_of_intel_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert choose_device() == torch.device("xpu")
    assert choose_dtype("xpu") == torch.bfloat16


def test_missing_device_is_answered_with_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcm_core.networks.device._fastest_device", lambda: "cpu")
    for name in ("abacus", "meta"):
        with pytest.raises(InputError, match=f"device '{name}' is not available here; use 'cpu'$"):
            choose_device(name)


def test_command_without_a_terminal_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that notebooks and hosts put in place of a terminal know no error handlers."""
    import argparse

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run_command(argparse.Namespace(run=lambda args: print("猫")), "", "") == 0
