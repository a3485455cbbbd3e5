"""Every flow family is distilled by the one trainer, and its LoRA is read by diffusers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import trainer.setup
from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks import frozen
from lcm_core.pipeline import Pipeline
from tests.flow_models import MODELS
from trainer.cli.main import main

STEPS = 50
OTHERS = sorted(MODELS.keys() - {"sd3", "wan"})


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for number, word in enumerate(("apple", "a long green pear", "", "plum")):
        pixels = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(number)) * 255
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(word)
    return folder


def distil(model, photos, folder, *words):
    options = ["--resolution", 32, "--steps", STEPS, "--batch-size", 8, "--rank", 16, "--w-min", 3, "--w-max", 3]
    options += ["--original-steps", 4, "--learning-rate", 1e-2, "--warmup-steps", 1, "--cooldown", 0]
    options += ["--samples", 0, "--preview-every", 0, "--no-tensorboard"]
    command = ["distill", "--teacher", model, "--data", photos, "--output", folder, "--device", "cpu"]
    return main([*map(str, command), *map(str, options), *map(str, words)])


def losses(folder: Path) -> torch.Tensor:
    return read_safetensors(folder / "run" / "state.safetensors")[0]["log"][:, 1]


ALL = ["sd3", "wan", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


@pytest.mark.parametrize("family", ALL)
def test_lcd_learns_and_its_lora_goes_into_diffusers(model_of, photos, tmp_path, family):
    """The loss falls; diffusers' loader takes every tensor of the file; and what it then paints is what we paint.

    The loss is compared with that of a student that stands still, on the same batches and noise: from one step to the
    next it changes by more than training does in all.
    """
    words = ["--loss", "l2"]
    assert distil(model_of(family), photos, tmp_path, *words) == 0
    assert distil(model_of(family), photos, tmp_path / "still", *words, "--learning-rate", 1e-12) == 0
    trained, still = (losses(folder)[-25:].mean() for folder in (tmp_path, tmp_path / "still"))
    assert float(trained) < 0.9 * float(still)
    file = tmp_path / f"{tmp_path.name}_lora.safetensors"
    assert check_lora(model_of(family), family, file).settings().sampler == "lcm"


@pytest.mark.parametrize("family", ALL)
def test_the_lora_of_tdm_goes_into_diffusers(model_of, photos, tmp_path, family):
    """It has learnt something. The loss says nothing: the critic's rises where the student's pictures become richer."""
    assert distil(model_of(family), photos, tmp_path, "--method", "tdm", "--learning-rate", 1e-3) == 0
    assert losses(tmp_path).isfinite().all()
    file = tmp_path / f"{tmp_path.name}_lora.safetensors"
    ups = [tensor for name, tensor in read_safetensors(file)[0].items() if "lora_B" in name or "lora_up" in name]
    assert any(bool(tensor.any()) for tensor in ups)
    assert check_lora(model_of(family), family, file).settings().sampler == "tcd"


def check_lora(folder, family, file):
    """diffusers' pipeline takes every tensor of a LoRA, and has the weights that ours has with it. Returns our
    model."""
    import diffusers

    tensors = read_safetensors(file)[0]
    pipe = getattr(diffusers, MODELS[family][1]).from_pretrained(folder, local_files_only=True)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    theirs = {
        name.partition(".lora_")[0]: module for name, module in pipe.transformer.named_parameters() if ".lora_" in name
    }
    assert len(theirs) == len(tensors) / 2
    ours = Pipeline.load(folder, device="cpu", dtype="float32", lora=[(file, 1.0)]).model
    pipe.fuse_lora()
    merged = {name.replace(".base_layer", ""): value for name, value in pipe.transformer.state_dict().items()}
    for name, value in ours.unet.model.state_dict().items():
        torch.testing.assert_close(
            value, merged[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    return ours


def test_a_family_is_trained_at_the_shift_that_it_states(model_of, photos, tmp_path):
    """SD3's 3; the file says so, and a sampler takes it from there."""
    assert distil(model_of("sd3"), photos, tmp_path, "--steps", 1) == 0
    metadata = read_safetensors(tmp_path / f"{tmp_path.name}_lora.safetensors")[1]
    assert json.loads(metadata["lcm_suite.recommended"])["shift"] == 3.0
    assert json.loads((tmp_path / "config.json").read_text())["shift"] == 0.0


@pytest.mark.parametrize(("family", "usual", "learnt"), [("flux", 3.5, 4), ("sd3", 1.0, 1)])
def test_few_steps_keep_the_guidance_that_a_network_reads(model_of, photos, tmp_path, family, usual, learnt):
    """Flux has guidance as an input, in training too; it was painted with 1, which a LoRA has never seen."""
    assert distil(model_of(family), photos, tmp_path, "--steps", 1, "--w-min", 3, "--w-max", 3) == 0
    file = tmp_path / f"{tmp_path.name}_lora.safetensors"
    model = Pipeline.load(model_of(family), device="cpu", lora=[(file, 1.0)]).model
    assert model.settings().guidance_scale == usual
    card = (tmp_path / "README.md").read_text()
    assert f"guidance_scale={learnt})" in card
    assert ("--guidance 4" in card, "FluxGuidance 4" in card) == (family == "flux",) * 2


def test_the_plan_of_a_run_names_weights_and_data(model_of, photos, tmp_path, capsys):
    assert distil(model_of("flux"), photos, tmp_path, "--dry-run") == 0
    assert "frozen weights" in (plan := capsys.readouterr().out)
    assert "4 pictures of about 32 x 32 pixels" in plan


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student", "full"], "student full is for U-Nets"),
        (["--prediction-type", "epsilon"], "does not go with a flow process"),
        (["--shift", "-1"], "shift -1.0 is out of range"),
    ],
)
def test_what_a_transformer_cannot_do_is_refused_at_once(model_of, photos, tmp_path, capsys, words, message):
    assert distil(model_of("sd3"), photos, tmp_path, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("words", [["--gradient-checkpointing"], ["--base-dtype", "int8"]], ids=["plain", "int8"])
def test_a_transformer_in_main_memory_teaches_the_same(model_of, photos, tmp_path, monkeypatch, words):
    monkeypatch.setattr(trainer.setup, "check_offload", lambda *_: None)
    monkeypatch.setattr(frozen, "_FEW", 64)
    words = ["--steps", 2, "--cache", tmp_path / "cache", *words]
    assert distil(model_of("sd3"), photos, tmp_path / "plain", *words) == 0
    assert distil(model_of("sd3"), photos, tmp_path / "offloaded", *words, "--offload") == 0
    states = [read_safetensors(tmp_path / name / "run/state.safetensors")[0] for name in ("plain", "offloaded")]
    for state in states:
        del state["log"]
    torch.testing.assert_close(*states)
