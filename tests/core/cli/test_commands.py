"""The command line as a user meets it: files, words, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lcm_core.cli.main import main
from tests.core.cli.conftest import CPU, files, shell

COMMANDS = ("generate", "compare", "interpolate", "export", "info")


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


def test_a_prompt_too_long_is_a_note_not_a_failure(emoji: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Words are left out, with a note, of plain prompts alone."""
    argv = ["generate", "a cat with a hat " * 10, "--model", emoji, "--steps", "1", "--output", "a.png", *CPU]
    assert main(argv) == 0
    assert "note: " not in capsys.readouterr().err
    assert main([*argv, "--prompt-syntax", "plain"]) == 0
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
    assert process.wait(timeout=120) == 0
    assert message == ""
