"""`distill --control`: what a run learns, what is refused, what is planned."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lcm_core.files.safetensors import read_safetensors
from tests.trainer.control.models import make_controlnet, make_t2i
from trainer.cli.main import main
from trainer.config import DistillConfig
from trainer.control import control_size
from trainer.data.teacher import Teacher
from trainer.disk import cache_size

QUICK = ["--batch-size", "2", "--rank", "2", "--preview-every", "0", "--no-tensorboard", "--device", "cpu"]
QUICK += ["--samples", "0", "--warmup-steps", "1", "--resolution", "64", "--steps", "1"]


def test_a_lora_is_learnt_in_layers_that_attend_to_pictures(teachers, photos, adapter, tmp_path):
    words = ["distill", "--teacher", teachers(), "--data", photos, "--output", tmp_path / "out", *QUICK]
    assert main([*map(str, words), "--control", str(adapter)]) == 0
    tensors = read_safetensors(tmp_path / "out" / "out_lora.safetensors")[0]
    for layer in ("q", "k", "v", "out_0"):
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_{layer}.lora_up.weight"
        assert bool(tensors[name].any()), name


@pytest.mark.parametrize("student", ["lora", "full"])
def test_a_run_learns_under_its_control(teachers, photos, hints, controlnet, tmp_path, student):
    """Its loss is another than without."""
    losses = []
    kind = [
        "--student",
        student,
        "--w-min",
        "1",
        "--w-max",
        "1",
        "--guidance-embedding-dim",
        "16",
        "--learning-rate",
        "1e-3",
    ]
    for given in (["--control", f"{controlnet}:0.5", "--control-pictures", hints], []):
        words = ["distill", "--teacher", teachers(), "--data", photos, "--output", tmp_path / str(len(given)), *QUICK]
        assert main([*map(str, words), *map(str, [*kind, *given])]) == 0
        lines = (tmp_path / str(len(given)) / "run" / "log.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[-1])["loss"])
    assert abs(losses[0] - losses[1]) > 1e-4 * losses[1]


def test_another_control_under_the_same_name_does_not_go_on_with_a_run(
    teachers, photos, hints, controlnet, tmp_path, capsys
):
    control = shutil.copytree(controlnet, tmp_path / "net")
    words = ["distill", "--teacher", teachers(), "--data", photos, "--output", tmp_path / "out", *QUICK]
    words += ["--control", control, "--control-pictures", hints]
    assert main([*map(str, words)]) == 0
    network = make_controlnet()
    torch.nn.init.zeros_(network.conv_in.weight)
    network.save_pretrained(control)
    assert main([*map(str, words), "--steps", "2"]) == 2
    assert f"control {control} has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--control", "{net}"], "has nothing to look at"),
        (["--control-pictures", "{hints}"], "but no control"),
        (["--control", "nothing", "--control-pictures", "{hints}"], "does not exist"),
        (["--control", "{net}", "--control-pictures", "nothing"], "is no folder"),
        (["--control", "{wide}", "--control-pictures", "{hints}"], "is for a U-Net of widths"),
        (["--control", "{ip}", "--gradient-checkpointing"], "leave gradient_checkpointing out"),
    ],
)
def test_what_cannot_guide_is_refused_in_a_line(
    teachers, photos, hints, controlnet, adapter, tmp_path, capsys, given, message
):
    make_t2i(3, (32, 32, 64, 64)).save_pretrained(tmp_path / "wide")
    places = {"net": controlnet, "hints": hints, "wide": tmp_path / "wide", "ip": adapter}
    words = ["distill", "--teacher", teachers(), "--data", photos, "--output", tmp_path / "out", *QUICK]
    assert main([*map(str, words), *(word.format(**places) for word in given)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_finished_cache_has_its_control_pictures(teachers, photos, hints, controlnet, tmp_path, capsys):
    """It can be trained from under the control, and not without."""
    cached = ["cache", "--teacher", teachers(), "--data", photos, "--cache", tmp_path / "cache", "--resolution", "64"]
    assert main([*map(str, cached), "--control-pictures", str(hints)]) == 0
    words = ["distill", "--teacher", teachers(), "--data", tmp_path / "cache", "--output", tmp_path / "out", *QUICK]
    assert main([*map(str, words)]) == 2
    assert "was made for a ControlNet or T2I-Adapter; give --control" in capsys.readouterr().err
    assert main([*map(str, words), "--control", str(controlnet)]) == 0


def test_the_plan_counts_the_control(teachers, controlnet):
    config, teacher = DistillConfig(control=f"{controlnet}:0.5"), Teacher(teachers())
    assert control_size(config, teacher.source) == sum(p.numel() for p in make_controlnet().parameters())
    assert control_size(DistillConfig(), teacher.source) == 0
    assert cache_size(teacher, 5, 2, 8, has_hints=True) - cache_size(teacher, 5, 2, 8) == 5 * 3 * 64 * 64
