"""A style LoRA becomes one for few steps: one command, two files, and how much of the style was kept."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch

from lcm_core.files.checkpoint import read_component
from lcm_core.files.lora import save_lora
from lcm_core.files.safetensors import read_metadata, read_safetensors
from lcm_core.networks.lora_layers import add_lora, lora_state_dict
from lcm_core.pipeline import Pipeline
from lcm_core.pipeline.sources import MODELS
from tests.trainer.conftest import build_unet
from trainer.accelerate import METHOD, usual_settings
from trainer.cli.main import main
from trainer.config import DistillConfig, StudentConfig
from trainer.data.settings import DataConfig
from trainer.data.teacher import Teacher, find_teacher
from trainer.evaluate.style import SHOWN_STEPS, References, choose_captions, kept, style_evaluation
from trainer.methods.config import SegmentedConfig
from trainer.options import add_options, resolve
from trainer.recipes.emoji.stages import LORA_RANK
from trainer.starts import check_lora_start

QUICK = ["--steps", "2", "--batch-size", "2", "--rank", "2", "--variants", "1", "--samples", "8", "--device", "cpu"]
QUICK += [
    "--teacher-steps",
    "1",
    "--resolution",
    "64",
    "--preview-every",
    "0",
    "--no-tensorboard",
    "--warmup-steps",
    "1",
]


@pytest.fixture
def style(tmp_path):
    """A LoRA of U-Net and text encoder, with weights that change every picture."""
    unet = build_unet()
    add_lora(unet, 2)
    tensors = lora_state_dict(unet)
    generator = torch.Generator().manual_seed(0)
    tensors = {k: v if v.ndim < 2 else 0.3 * torch.randn(v.shape, generator=generator) for k, v in tensors.items()}
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    shapes = {"lora_down.weight": (2, 128), "lora_up.weight": (128, 2)}
    tensors |= {f"{text}.{half}": 0.3 * torch.randn(shape, generator=generator) for half, shape in shapes.items()}
    save_lora(tmp_path / "style.safetensors", tensors, "sd1")
    return tmp_path / "style.safetensors"


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n\na house\n")
    return tmp_path / "prompts.txt"


def test_one_command_makes_a_style_fast(teachers, style, prompts, tmp_path, capsys):
    """The file with both paints what style and patch paint together; the run ends with the line about the style."""
    folder, out = teachers(), tmp_path / "out"
    words = ["accelerate", "--teacher", folder, "--lora", f"{style}:0.8", "--prompts", prompts, "--output", out, *QUICK]
    assert main([*map(str, words), "--dry-run"]) == 0
    assert not out.exists()
    assert main([*map(str, words)]) == 0
    assert "4 steps keep of base + LoRA at 25 steps: style " in capsys.readouterr().out
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["role"] for row in rows} == {"base", "teacher", "student"}
    assert "steps keep of base + LoRA" in (out / "report.html").read_text(encoding="utf-8")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "out_patch.safetensors" in card
    assert read_metadata(out / "out_lora.safetensors")["lcm_suite.recommended"]
    together = [(out / "out_lora.safetensors", 1.0)], [(style, 0.8), (out / "out_patch.safetensors", 1.0)]
    one, two = (Pipeline.load(folder, device="cpu", dtype="float32", lora=loras) for loras in together)
    for name in ("unet", "text"):
        networks = [
            pipe.model.unet.model if name == "unet" else pipe.model.text.encoders[0].model for pipe in (one, two)
        ]
        first, second = (network.state_dict() for network in networks)
        for key, weight in first.items():
            torch.testing.assert_close(weight, second[key], rtol=0, atol=5e-3)  # stored in float16
    before = read_safetensors(out / "run" / "references.safetensors")[0]
    assert main([*map(str, words)]) == 0  # a finished run paints and measures nothing again
    assert torch.equal(before["styled"], read_safetensors(out / "run" / "references.safetensors")[0]["styled"])


def test_a_lora_belongs_to_what_a_teacher_is(teachers, style):
    """Its latents, its texts and its run are others with it, and with another strength."""
    plain, styled, weaker = (Teacher(teachers(), lora=lora) for lora in ((), (str(style),), (f"{style}:0.5",)))
    for hashed in (lambda teacher: teacher.hash_unet(""), lambda teacher: tuple(teacher.hash_text())):
        assert len({hashed(teacher) for teacher in (plain, styled, weaker)}) == 3


def test_nothing_but_teacher_lora_and_prompts_is_needed(prompts):
    config = DistillConfig(teacher="emoji", lora=("ink.safetensors:0.5",), data=DataConfig(prompts=str(prompts)))
    usual = usual_settings(config)
    assert usual["output"] == "runs/ink-fast"
    assert usual["method"] == {"w_min": 1.0, "w_max": 1.0}  # the embedded teacher is used at guidance 2
    assert usual["data"] == {"variants": 16}


def read_command(*words):
    """The settings that a command line means."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    args = parser.parse_args(["--lora", "a.safetensors", *words])
    return resolve(args, usual_settings(resolve(args, METHOD)))


def test_the_embedded_model_learns_for_four_steps_alone(teachers):
    """Where its teacher needs no more than eight; another model, or another method, learns as it did."""
    ours = read_command("--teacher", "emoji")
    assert isinstance(ours.method, SegmentedConfig)
    assert (ours.method.phases, ours.method.original_steps, ours.method.w_max) == (SHOWN_STEPS, 8, 1.0)
    assert (ours.student.start, ours.student.rank) == ("", 16)
    assert read_command("--teacher", "emoji", "--original-steps", "16").method.original_steps == 16
    asked = read_command("--teacher", "emoji", "--method", "lcd")
    assert (asked.method.kind, asked.method.original_steps) == ("lcd", 50)
    assert asked.student.start.endswith("lcm_lora.safetensors")
    other = read_command("--teacher", str(teachers()))
    assert (other.method.kind, other.method.original_steps) == ("lcd", 50)
    assert read_command("--teacher", str(teachers()), "--method", "segmented").method.original_steps == 50


def test_the_speed_that_a_model_comes_with_is_where_its_student_starts(prompts):
    """Rank and file of the embedded model's LCM-LoRA; not where another start, or another rank, was asked for."""
    config = DistillConfig(teacher="emoji", lora=("ink.safetensors",), data=DataConfig(prompts=str(prompts)))
    own = MODELS / "emoji" / "lora" / "lcm_lora.safetensors"
    student = usual_settings(config)["student"]
    assert (student["start"], student["rank"]) == (str(own), LORA_RANK)
    check_lora_start(own, read_component(find_teacher("emoji").unet, "unet"), StudentConfig(rank=student["rank"]))
    for asked in (StudentConfig(rank=4), StudentConfig(start="other.safetensors")):
        assert "start" not in usual_settings(replace(config, student=asked))["student"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora", "x.safetensors"], "no teacher was given"),
        (["--teacher", "emoji", "--prompts", "{prompts}"], "no LoRA was given"),
        (["--teacher", "emoji", "--prompts", "{prompts}", "--lora", "x.safetensors"], "x.safetensors"),
        (["--teacher", "emoji", "--prompts", "{prompts}", "--lora", "{style}"], "for another architecture"),
        (["--teacher", "{teacher}", "--prompts", "{prompts}", "--lora", "{style}", "--student", "full"], "export"),
    ],
)
def test_what_cannot_be_made_fast_is_refused_in_a_line(words, message, teachers, style, prompts, tmp_path, capsys):
    given = {"prompts": prompts, "style": style, "teacher": teachers()}
    assert main(["accelerate", *(word.format(**given) for word in words), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_style_score_is_the_share_of_the_way_from_base_to_base_with_lora():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    styled = base + torch.tensor([1.0, 0.0, -2.0, 0.5])
    references = References([f"p{i % 4}" for i in range(8)], base, styled, 1.0)
    scores = style_evaluation(references, lambda pictures: pictures).alignment
    for share in (0.0, 0.5, 1.0):
        assert scores(base + share * (styled - base))["style"] == pytest.approx(share)
    assert scores(styled)["alignment"] == 1.0
    assert scores(styled.roll(1, 0))["alignment"] == 0.0


def test_what_is_kept_is_told_beside_the_teacher_at_25_steps():
    teacher = {"role": "teacher", "steps": 25, "style": 1.0, "alignment": 0.8, "recall": 0.5}
    student = {"role": "student", "steps": 4, "style": 0.96, "alignment": 0.6, "recall": 0.5}
    others = [{**teacher, "steps": 4, "style": 0.1}, {**student, "steps": 8, "style": 0.1}]
    words = "4 steps keep of base + LoRA at 25 steps: style 96%, alignment 75%, recall 100%"
    assert kept([*others, teacher, student]) == words
    assert kept([{"role": "student", "steps": 4}]) == ""


def test_captions_come_from_all_over_and_equally_often():
    assert choose_captions(["a", "b", "a", "", "c", "d"], 2) == ["a", "c"]
    assert choose_captions(["a", "b"], 5) == ["a", "b", "a", "b", "a"]


def test_a_preset_goes_before_what_the_command_usually_sets(prompts):
    parser = argparse.ArgumentParser()
    add_options(parser)
    words = ["--preset", "sd15-lora", "--teacher", "emoji", "--lora", "a.safetensors", "--steps", "7"]
    args = parser.parse_args(words)
    config = resolve(args, usual_settings(resolve(args, METHOD)))
    assert (config.training.steps, config.training.batch_size, config.method.w_min) == (7, 16, 7.5)
    assert config.output == "runs/a-fast"
