"""Students that are told where a jump ends: trained, written, painted with, and refused where nobody tells them."""

import json
from dataclasses import replace

import pytest
import torch

from lcm_core.cli.main import main as lcm_core_main
from lcm_core.diffusion.flow_map import END_KEY
from lcm_core.files.checkpoint import read_component
from lcm_core.pipeline.generate import Inputs, noise_source, paint
from lcm_core.pipeline.model import load_model
from lcm_core.pipeline.prompts import encode_prompts
from trainer.cli.main import main


def _distil(teacher, photos, output, *words):
    options = ["--data", photos, "--steps", 2, "--batch-size", 4, "--warmup-steps", 1, "--learning-rate", 0.03]
    quiet = ["--samples", 0, "--preview-every", 0, "--no-tensorboard", "--name", "mine"]
    command = ["distill", "--teacher", teacher, "--output", output, *options, *quiet, *words]
    return main([str(word) for word in command])


@pytest.fixture(scope="module")
def student(teachers, photos, tmp_path_factory):
    output = tmp_path_factory.mktemp("flow_map")
    assert _distil(teachers("v_prediction"), photos, output, "--student", "full", "--method", "flowmap") == 0
    return output


def _paint(model, **settings):
    chosen = replace(model.settings(), width=64, height=64, **settings)
    cond = encode_prompts(model, ["picture number 3"], (64, 64), "plain")
    return paint(model, Inputs(cond, None, noise_source([7], model.device)), chosen)


def test_a_student_is_a_folder_that_our_pipeline_alone_opens(student):
    from diffusers import DiffusionPipeline

    assert not list(student.glob("*.safetensors")), "hosts would load it, and drop the end in silence"
    assert not (student / "workflow_comfyui.json").exists()
    assert "from diffusers" not in (student / "README.md").read_text()
    assert json.loads((student / "diffusers" / "unet" / "config.json").read_text())[END_KEY] == 256
    model = load_model(student / "diffusers", "cpu")
    said = model.recommended
    assert (said.sampler, said.steps, said.gamma) == ("tcd", 4, 0.0)
    assert (model.unet.guidance_embedding_dim, model.unet.end_embedding_dim) == (256, 256)
    with pytest.raises(AttributeError, match="LCMSuiteFlowMapPipeline"):
        DiffusionPipeline.from_pretrained(student / "diffusers")


def test_it_has_learnt_to_read_the_end(student):
    """Its weights begin at zero."""
    weight = read_component(student / "diffusers" / "unet", "unet").tensors["time_embedding.cond_proj.weight"]
    guidance, end = weight.float().split(256, dim=1)
    assert guidance.norm() > 0
    assert end.norm() > 0
    model = load_model(student / "diffusers", "cpu")
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([700.0, 700.0])
    given = {"encoder_hidden_states": torch.zeros(2, 77, 128), "timestep_cond": torch.zeros(2, 256)}
    with torch.no_grad():
        here, there = model.unet(x[:1].expand_as(x), t, **given, end=torch.tensor([0.0, 0.6]))
    assert (here - there).abs().max() > 1e-4


@pytest.mark.parametrize("steps", [1, 3])
def test_the_command_paints_with_it(student, tmp_path, steps):
    output = tmp_path / "picture.png"
    words = ["generate", "--model", student / "diffusers", "x", "--steps", steps, "--output", output]
    assert lcm_core_main([str(word) for word in words]) == 0
    assert output.exists()


def test_what_cannot_tell_it_the_end_is_refused(student, teachers, photos, tmp_path, capsys):
    folder = str(student / "diffusers")
    paint = ["generate", "--model", folder, "x", "--output", str(tmp_path / "x.png"), "--sampler"]
    single = ["export", "--model", folder, "--to", "single-file", "--path", str(tmp_path / "x.safetensors")]
    for words, said in (
        ([*paint, "euler"], "use tcd"),
        ([*paint, "lcm"], "use tcd"),
        (single, "flow map"),
    ):
        assert lcm_core_main(words) != 0
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    for teacher, words, said in (
        (teachers(), ["--method", "flowmap"], "full students"),
        (folder, ["--method", "lcd"], "is a flow map"),
        (teachers("v_prediction"), ["--student", "full", "--start", folder], "is a flow map"),
    ):
        assert _distil(teacher, photos, tmp_path / "run", *words) != 0
        assert said in capsys.readouterr().err


def test_it_goes_on_from_an_earlier_one(student, teachers, photos, tmp_path):
    words = ["--student", "full", "--method", "flowmap", "--start", student / "diffusers", "--learning-rate", 1e-9]
    assert _distil(teachers("v_prediction"), photos, tmp_path, *words) == 0
    before, after = (load_model(folder / "diffusers", "cpu") for folder in (student, tmp_path))
    torch.testing.assert_close(_paint(after), _paint(before), rtol=0, atol=2e-3)  # stored in float16


def test_a_dry_run_counts_its_weights(teachers, photos, tmp_path, capsys):
    assert _distil(teachers(), photos, tmp_path, "--student", "full", "--method", "flowmap", "--dry-run") == 0
    shown = capsys.readouterr().out
    model = load_model(teachers(), "cpu")
    more = 512 * model.unet.model.time_embedding.linear_1.in_features
    count = sum(parameter.numel() for parameter in model.unet.model.parameters()) + more
    assert f"{count:,}" in shown
