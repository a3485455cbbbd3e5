"""A model that was exported paints what it painted before: nothing that it says of itself is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lcm_core.cli.main import main
from lcm_core.errors import InputError
from lcm_core.files.recommended import RECOMMENDED_KEY, SAMPLERS, recommended_in
from lcm_core.pipeline.model import load_model

HOSTS = {"comfyui": "models/checkpoints", "a1111": "models/Stable-diffusion"}


def export(to: str, model: str, root: Path, *options: str) -> Path:
    """Where the exported model lies."""
    path = root / to
    if to in HOSTS:
        (path / HOSTS[to]).mkdir(parents=True)
        (path / "modules").mkdir()
        (path / "modules" / "sd_models.py").write_text("")
    elif to == "single-file":
        path = root / "one.safetensors"
    assert main(["export", "--to", to, "--path", str(path), "--model", model, *options]) == 0
    if to not in HOSTS:
        return path
    return next(file for file in (path / HOSTS[to]).glob("*.safetensors") if "teacher" not in file.name)


def paint(model: str, out: Path, *options: str) -> bytes:
    argv = ["generate", "a slice of pizza", "--model", model, "--output", str(out), "--seed", "3", "--device", "cpu"]
    assert main([*argv, *options]) == 0
    return Image.open(out).tobytes()


@pytest.mark.parametrize("to", ["single-file", "diffusers", "comfyui", "a1111"])
def test_export_of_the_embedded_model_paints_another_picture(to: str, tmp_path: Path) -> None:
    """Its file is in the number format that it is shipped in, so the picture is the same, bit for bit."""
    exported = export(to, "emoji", tmp_path)
    assert paint(str(exported), tmp_path / "b.png") == paint("emoji", tmp_path / "a.png")


@pytest.mark.parametrize("to", ["single-file", "diffusers"])
@pytest.mark.parametrize("options", [(), ("--lora", "lcm_lora:0.8")], ids=["teacher", "teacher and LoRA"])
def test_export_of_the_teacher_is_sampled_in_another_way(
    to: str, options: tuple[str, ...], models: Path, tmp_path: Path
) -> None:
    model, choice = str(models / "emoji"), ("--unet", "teacher", *options)
    exported = export(to, model, tmp_path, *choice)
    again = load_model(exported, "cpu")
    own = load_model(model, "cpu", unet="teacher", lora=[("lcm_lora", 0.8)] if options else [])
    assert again.recommended == own.recommended
    for sampler in SAMPLERS:
        assert again.settings(sampler) == own.settings(sampler)
    assert paint(str(exported), tmp_path / "b.png") == paint(model, tmp_path / "a.png", *choice)


@pytest.mark.parametrize(
    "text",
    [
        *("[", "[1]", '{"steps": "4"}', '{"steps": 0}', '{"steps": true}', '{"sampler": "heun"}'),
        *('{"guidance_scale": NaN}', '{"resolution": 1000000}', '{"shift": 0}', '{"sampler": ["lcm"]}'),
    ],
)
def test_statement_that_makes_no_sense_is_followed(text: str) -> None:
    with pytest.raises(InputError, match=r"lcm_suite\.recommended.*it"):
        recommended_in({RECOMMENDED_KEY: text}, "a.safetensors")


@pytest.mark.parametrize("own", [[1], {"sampler": "lcm", "steps": "many"}, {"sampler": 3}])
def test_folder_that_states_nonsense(own: object, models: Path, tmp_path: Path) -> None:
    for part in ("unet", "vae", "text_encoder", "tokenizer"):
        (tmp_path / part).symlink_to(models / "plain" / part)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": [1], "_lcm_suite": own}))
    with pytest.raises(InputError, match=str(tmp_path)):
        load_model(tmp_path, "cpu")


def test_lora_decides_how_an_exported_teacher_is_sampled(models: Path, tmp_path: Path) -> None:
    """Wrong when the teacher's own sampler, stated in its file, were kept for the LCM that a LoRA makes of it."""
    exported = export("single-file", str(models / "emoji"), tmp_path, "--unet", "teacher")
    assert load_model(exported, "cpu").recommended.sampler == "dpmpp_2m"
    lora = models / "emoji" / "lora" / "lcm_lora.safetensors"
    model = load_model(exported, "cpu", lora=[(lora, 1.0)])
    assert (model.settings().sampler, model.recommended.is_distilled) == ("lcm", True)
