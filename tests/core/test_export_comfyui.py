"""`export --to comfyui`: files where ComfyUI looks for them, whole, and nothing else touched."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import lcm_core
from lcm_core.cli.main import main
from lcm_core.diffusion.guidance import guidance_bias
from lcm_core.files.checkpoint import AS_FLOW, read_component, read_info, read_safetensors
from lcm_core.files.recommended import read_recommended

COND_PROJ = "model.diffusion_model.time_embed.cond_proj.weight"


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """The folders of a ComfyUI that was just installed."""
    (tmp_path / "comfyui" / "models" / "checkpoints").mkdir(parents=True)
    return tmp_path / "comfyui"


@pytest.fixture
def velocity(models: Path, tmp_path: Path) -> Path:
    """The shipped model, said to predict v."""
    folder = tmp_path / "velocity"
    folder.mkdir()
    for part in (models / "emoji").iterdir():
        if part.name != "model.json":
            (folder / part.name).symlink_to(part)
    card = (models / "emoji" / "model.json").read_text(encoding="utf-8")
    (folder / "model.json").write_text(card.replace('"epsilon"', '"v_prediction"'), encoding="utf-8")
    return folder


def _export(models: Path, comfyui: Path, *options: str) -> int:
    return main(["export", "--to", "comfyui", "--path", str(comfyui), "--model", str(models / "emoji"), *options])


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_a_shipped_model_goes_there_whole(models: Path, comfyui: Path) -> None:
    """Wrong when a part is missing, or the full LCM loses its guidance or its default."""
    assert _export(models, comfyui) == 0
    checkpoints = comfyui / "models" / "checkpoints"
    assert _files(comfyui) == [
        "input/lcm_suite_hole.png",
        "input/lcm_suite_sketch.png",
        "models/checkpoints/emoji_lcm.safetensors",
        "models/checkpoints/emoji_teacher.safetensors",
        "models/loras/emoji_lcm_lora.safetensors",
    ]
    full, _ = read_safetensors(checkpoints / "emoji_lcm.safetensors")
    original = read_component(models / "emoji" / "unet_lcm", "unet").tensors["time_embedding.cond_proj.weight"]
    torch.testing.assert_close(full[COND_PROJ], original, rtol=0, atol=0)
    assert read_recommended(checkpoints / "emoji_lcm.safetensors").guidance_scale == 4.0
    assert read_recommended(checkpoints / "emoji_teacher.safetensors").guidance_scale is None
    assert Image.open(comfyui / "input" / "lcm_suite_hole.png").getchannel("A").getextrema() == (0, 255)


def test_the_teacher_as_a_flow_model(
    models: Path, velocity: Path, comfyui: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own file with the mark that makes ComfyUI load it as a flow model; to lcm_core it is the model that it was.
    What cannot be one is refused, before anything is written."""
    command = ["export", "--path", str(comfyui), "--flow", "--model"]
    assert main([*command, str(velocity), "--to", "comfyui"]) == 0
    assert _files(comfyui) == ["models/checkpoints/velocity_teacher_flow.safetensors"]
    file = comfyui / "models" / "checkpoints" / "velocity_teacher_flow.safetensors"
    assert {AS_FLOW, "v_pred"} <= read_safetensors(file)[0].keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_info(file).prediction_type == "v_prediction"
    for model, host in ((velocity, "a1111"), (file, "comfyui"), (models / "emoji", "comfyui")):
        assert main([*command, str(model), "--to", host]) == 2
        assert "--flow makes a flow model of the embedded model" in capsys.readouterr().err
    assert len(_files(comfyui)) == 1


def test_the_prediction_type_is_marked_as_comfyui_reads_it(models: Path, comfyui: Path, velocity: Path) -> None:
    """Wrong when a v-prediction model would be sampled as one that predicts noise, or the other way round."""
    for folder, expected in ((models / "emoji", "epsilon"), (velocity, "v_prediction")):
        assert main(["export", "--to", "comfyui", "--path", str(comfyui), "--model", str(folder)]) == 0
        for kind in ("lcm", "teacher"):
            file = comfyui / "models" / "checkpoints" / f"{folder.name}_{kind}.safetensors"
            assert ("v_pred" in read_safetensors(file)[0]) == (expected == "v_prediction")
            assert read_info(file).prediction_type == expected


def test_one_network_or_a_merged_lora_goes_alone(models: Path, comfyui: Path) -> None:
    """Wrong when asking for one checkpoint scatters others."""
    assert _export(models, comfyui, "--unet", "teacher", "--lora", "lcm_lora") == 0
    assert _files(comfyui) == ["models/checkpoints/emoji_teacher.safetensors"]


def test_a_second_export_replaces_the_first_but_no_strangers_file(
    models: Path, comfyui: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong when new weights cannot be exported over old ones, or the user's own file of that name is lost."""
    assert _export(models, comfyui) == 0
    assert _export(models, comfyui) == 0
    own = comfyui / "models" / "checkpoints" / "emoji_lcm.safetensors"
    save_file({"mine": torch.ones(1)}, own)
    capsys.readouterr()
    assert _export(models, comfyui) == 2
    assert "is no export of LCM Suite" in capsys.readouterr().err
    assert list(read_safetensors(own)[0]) == ["mine"]


def test_an_embedded_python_runs_the_command_by_its_path(tmp_path: Path) -> None:
    """Wrong when a portable ComfyUI's Python, which sees neither the current folder nor an installed package, cannot
    export."""
    command = [sys.executable, "-I", "-S", str(Path(lcm_core.__file__).parent), "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("lcm-suite"), done.stderr


def test_a_folder_that_is_no_comfyui_is_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong when a mistyped path gets a models folder of its own."""
    assert _export(models, tmp_path / "nowhere") == 2
    assert "is no ComfyUI folder" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0, 8.5])
def test_guidance_bias_is_what_diffusers_computes(guidance_scale: float) -> None:
    """Wrong when a program without cond_proj gets another guidance than diffusers gives."""
    from diffusers import LatentConsistencyModelPipeline
    from diffusers.models.embeddings import TimestepEmbedding

    torch.manual_seed(0)
    embedding = TimestepEmbedding(32, 128, cond_proj_dim=256)
    w_embedding = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None, torch.tensor([guidance_scale - 1]), embedding_dim=256
    )
    sample = torch.randn(1, 32)
    expected = embedding(sample, w_embedding)
    shift = guidance_bias(guidance_scale, embedding.cond_proj.weight, embedding.linear_1.weight)
    embedding.linear_1.bias.data += shift
    torch.testing.assert_close(embedding(sample), expected, rtol=1e-5, atol=1e-5)
