"""The command line as a user meets it: files, words, exit codes, and nothing left behind by a mistake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lcm_core
from lcm_core.cli.main import main
from lcm_core.pipeline.image import save_image

COMMANDS = ("generate", "compare", "interpolate", "export", "info")
CPU = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture
def emoji(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny model's path; the test runs in a folder of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return str(models / "emoji")


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def shell(*argv: str, **options) -> subprocess.Popen[str]:
    root = str(Path(lcm_core.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *argv], env=environment, **pipes, **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example: python -m lcm_core {command}" in capsys.readouterr().out


def test_help_loads_no_heavy_library() -> None:
    """Seconds of imports before a help text are felt as a hang."""
    code = """
import sys
from lcm_core.cli.main import main
from lcm_core.pipeline.image import save_image
try:
    main(["generate", "--help"])
except SystemExit:
    pass
print({name for name in ("torch", "numpy", "PIL", "diffusers", "transformers") if name in sys.modules})
"""
    output, _ = shell("-c", code).communicate(timeout=120)
    assert output.splitlines()[-1] == "set()"


def test_generate_info_and_the_same_bytes_again(emoji: str, capsys: pytest.CaptureFixture[str]) -> None:
    # No --dtype: what was chosen for each network must be found in the file.
    argv = ["generate", "a slice of pizza", "--model", emoji, "--output", "pizza.png", "--seed", "7", "--device", "cpu"]
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"pizza.png: model {emoji} (lcm), 4 steps, guidance 4, seed 7; loaded in ")
    assert "4/4" in printed.err  # the progress bar
    assert main(["info", "pizza.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"prompt: a slice of pizza", "seed: 7", "num_inference_steps: 4", "dtype: float32"} <= set(lines)
    assert main(["generate", "--from", "pizza.png"]) == 0
    assert files() == ["pizza-again.png", "pizza.png"]
    assert Path("pizza-again.png").read_bytes() == Path("pizza.png").read_bytes()
    assert main(["generate", "--from", "pizza.png", "--seed", "8", "--output", "other.png"]) == 0
    assert Image.open("other.png").tobytes() != Image.open("pizza.png").tobytes()


def test_every_setting_survives_the_way_through_the_file(emoji: str) -> None:
    """Whatever was set must be stored and used again, or the second file would differ."""
    Image.effect_noise((64, 64), 80).convert("RGB").save("in.png")
    options = ["--steps", "3", "--guidance", "2", "--sampler", "tcd", "--gamma", "0.5", "--original-steps", "40"]
    options += ["--size", "128x64", "--strength", "0.8"]
    lora = ["--unet", "teacher", "--lora", "lcm_lora:0.7", "--negative", "dull", "--vae-dtype", "bfloat16"]
    argv = ["generate", "a cat, 猫", "--model", emoji, "--image", "in.png", *options, *lora, *CPU]
    assert main([*argv, "--output", "a.png"]) == 0
    assert main(["generate", "--from", "a.png", "--output", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert main(["generate", "--from", "a.png", "--output", "b.png"]) == 0
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert main([*argv, "--output", "c.png", "--lora", "lcm_lora:0.1"]) == 0
    assert Image.open("c.png").tobytes() != Image.open("a.png").tobytes()


def test_many_pictures_are_each_their_own_seeds(emoji: str) -> None:
    argv = ["generate", "A cat!", "--model", emoji, "--steps", "1", *CPU]
    assert main([*argv, "--seed", "3", "--count", "2", "--output", "cats"]) == 0
    assert sorted(path.name for path in Path("cats").iterdir()) == ["a-cat-3.png", "a-cat-4.png"]
    assert main([*argv, "--seed", "4", "--output", "one.png"]) == 0
    assert Path("one.png").read_bytes() == Path("cats/a-cat-4.png").read_bytes()


def test_inpainting_and_upscaling_from_the_command_line(emoji: str) -> None:
    Image.new("RGB", (64, 64), "red").save("in.png")
    Image.new("L", (64, 64), 0).save("nothing.png")
    argv = ["generate", "a cat", "--model", emoji, "--steps", "1", *CPU]
    assert main([*argv, "--image", "in.png", "--mask", "nothing.png", "--output", "kept.png"]) == 0
    assert Image.open("kept.png").tobytes() == Image.open("in.png").tobytes()
    argv = ["generate", "a cat", "--model", emoji, "--timesteps", "999,499", *CPU]
    assert main([*argv, "--upscale", "2", "--output", "big.jpg"]) == 0
    assert Image.open("big.jpg").size == (128, 128)


def test_compare_paints_teacher_and_student_in_one_grid(emoji: str) -> None:
    argv = ["compare", "a cat", "a dog", "--model", emoji, "--teacher-steps", "2", "1", "--steps", "1", "2", *CPU]
    assert main([*argv, "--output", "grid.png"]) == 0
    grid = Image.open("grid.png")
    assert grid.width == 4 * 72 + 8
    assert grid.height > 2 * 64 + 40
    with Image.open("grid.png") as image:
        columns = [image.crop((8 + 72 * i, image.height - 72, 72 + 72 * i, image.height - 8)) for i in range(4)]
    assert main(["generate", "a dog", "--model", emoji, "--steps", "2", "--output", "lcm.png", *CPU]) == 0
    assert columns[3].tobytes() == Image.open("lcm.png").tobytes()
    teacher = ["--unet", "teacher", "--steps", "2", "--output", "teacher.png"]
    assert main(["generate", "a dog", "--model", emoji, *teacher, *CPU]) == 0
    assert columns[0].tobytes() == Image.open("teacher.png").tobytes()


def test_interpolate_writes_frames_whose_ends_are_the_single_pictures(emoji: str) -> None:
    common = ["--model", emoji, "--steps", "2", *CPU]
    travel = ["--from", "a cat", "--to", "a dog", "--seed", "1", "--to-seed", "2", "--frames", "3", "--ease", "sine"]
    assert main(["interpolate", *travel, *common, "--output", "frames"]) == 0
    names = sorted(path.name for path in Path("frames").iterdir())
    assert names == ["frame_0000.png", "frame_0001.png", "frame_0002.png"]
    for prompt, seed, name in (("a cat", "1", names[0]), ("a dog", "2", names[2])):
        assert main(["generate", prompt, "--seed", seed, *common, "--output", "single.png"]) == 0
        assert Image.open("single.png").tobytes() == Image.open(Path("frames") / name).tobytes()
    keyframes = ["--keyframe", "a cat@1", "--keyframe", "a dog@2", "--loop", "--frames", "4"]
    assert main(["interpolate", *keyframes, *common, "--output", "loop.gif"]) == 0
    with Image.open("loop.gif") as animation:
        assert animation.n_frames == 4


@pytest.mark.parametrize("layout", ["single-file", "diffusers"])
def test_an_exported_model_paints_the_same_picture(emoji: str, layout: str) -> None:
    target = "model.safetensors" if layout == "single-file" else "model"
    lora = ["--unet", "teacher", "--lora", "lcm_lora:0.5"]
    assert main(["export", "--model", emoji, *lora, "--to", layout, "--path", target]) == 0
    common = ["a cat", "--steps", "2", "--sampler", "lcm", "--guidance", "1", "--size", "64", *CPU]
    assert main(["generate", *common, "--model", emoji, *lora, "--output", "a.png"]) == 0
    assert main(["generate", *common, "--model", target, "--output", "b.png"]) == 0
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()


def test_info_knows_checkpoints_loras_and_folders(emoji: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", emoji, "--to", "single-file", "--path", "m.safetensors", "--dtype", "fp16"]) == 0
    for target, words in {
        "m.safetensors": ("architecture: sd1", "guidance embedding: 256", "float16", "prediction_type: epsilon"),
        f"{emoji}/lora/lcm_lora.safetensors": ("kind: LoRA", "unet: 4 layers, rank 4, alpha 4"),
        emoji: ("name: emoji", "unet_teacher: ", "lora: lcm_lora"),
    }.items():
        capsys.readouterr()
        assert main(["info", target]) == 0
        printed = capsys.readouterr().out
        for word in words:
            assert word in printed


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


def test_a_prompt_too_long_is_a_note_not_a_failure(emoji: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "a cat with a hat " * 10, "--model", emoji, "--steps", "1", "--output", "a.png", *CPU]
    assert main(argv) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "75 tokens" in notes[0]


def test_a_plain_model_asked_for_few_steps_gets_advice(emoji: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "a cat", "--model", str(Path(emoji).parent / "plain"), "--output", "a.png", *CPU]
    assert main(argv) == 0
    assert "need an LCM-LoRA" in capsys.readouterr().err
    assert main([*argv, "--lora", f"{emoji}/lora/lcm_lora.safetensors"]) == 0
    assert "LCM-LoRA" not in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """`python -m lcm_core info emoji | head -1` must not end in a traceback."""
    process = shell("-m", "lcm_core", "info", "emoji")
    process.stdout.close()
    message = process.stderr.read()
    assert process.wait() == 0
    assert message == ""
