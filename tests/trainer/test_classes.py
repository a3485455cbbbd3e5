"""Class-conditional teachers are distilled, scored and painted with like the others."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from lcm_core.errors import InputError
from lcm_core.pipeline import Pipeline
from tests.class_models import KINDS, models_in
from trainer.cli.main import main
from trainer.data.cache import prepare
from trainer.data.labels import read_labelled
from trainer.data.settings import DataConfig
from trainer.data.teacher import Teacher
from trainer.evaluate.metrics import class_alignment
from trainer.recipes.classes import build_unet
from trainer.recipes.emoji.data import load_shipped

QUICK = ["--batch-size", "4", "--rank", "2", "--preview-every", "0", "--no-tensorboard", "--device", "cpu"]
QUICK += ["--samples", "0", "--warmup-steps", "1", "--guidance-embedding-dim", "16"]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return models_in(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures of each of two classes, in folders named like them."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        pixels = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(number)) * 255
        file = folder / ("cat", "dog")[number // 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.byte().numpy()).save(file)
    return folder


def test_folders_are_labels_and_the_dropped_one_stands_for_none(folder_of, pictures, tmp_path):
    cache = prepare(DataConfig(path=str(pictures)), folder_of("UNet2DModel"), tmp_path, "cpu")
    batch = cache.batch(4, torch.Generator().manual_seed(0))
    assert sorted(batch.conditioning["class_labels"].tolist()) == [0, 0, 1, 1]
    assert batch.null_conditioning["class_labels"].tolist() == [3, 3, 3, 3]
    dropped = cache.batch(64, torch.Generator().manual_seed(0), caption_dropout=0.5).conditioning["class_labels"]
    assert 16 < int((dropped == 3).sum()) < 48


def test_labels_come_from_a_column(folder_of, pictures, tmp_path):
    for number in range(3):
        Image.open(pictures / "cat" / "0.png").save(tmp_path / f"{number}.png")
    kinds = (("0.png", "dog"), ("1.png", 2), ("2.png", "tabby"))
    lines = [json.dumps({"file_name": name, "kind": kind, "text": "words"}) for name, kind in kinds]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    classes = Teacher(folder_of("UNet2DModel")).labels
    found = [item.caption for item in read_labelled(tmp_path, "kind", classes).items]
    assert found == ["dog", "2", "tabby"]
    assert [item.caption for item in read_labelled(tmp_path, "", None).items] == ["words"] * 3
    with pytest.raises(InputError, match="no labels 'breed'"):
        read_labelled(tmp_path, "breed", None)


def test_a_class_that_the_teacher_does_not_know_is_named(folder_of, pictures, tmp_path):
    (tmp_path / "cot").mkdir()
    Image.open(pictures / "cat" / "0.png").save(tmp_path / "cot" / "0.png")
    with pytest.raises(InputError, match=r"class 'cot'.*choose one of cat"):
        read_labelled(tmp_path, "", Teacher(folder_of("UNet2DModel")).labels)


@pytest.mark.parametrize(
    ("kind", "student"), [*((kind, "full") for kind in KINDS), ("dit", "lora"), ("UNet2DModel", "lora")]
)
def test_every_kind_is_distilled_and_its_student_paints(folder_of, pictures, tmp_path, kind, student):
    """A full student reads w through inputs that training moves; `Pipeline` loads what either run has written."""
    w = ("--w-min", "1", "--w-max", "1") if student == "lora" else ("--w-min", "0", "--w-max", "3")
    words = ["distill", "--teacher", folder_of(kind), "--data", pictures, "--output", tmp_path / "out"]
    words += ["--student", student, *w, "--steps", "3", "--learning-rate", "1e-3", *QUICK]
    if kind == "dit":
        assert main([*map(str, words), "--dry-run"]) == 0
    assert main([*map(str, words)]) == 0
    if student == "lora":
        files = [(tmp_path / "out" / "out_lora.safetensors", 1.0)]
        pipe = Pipeline.load(folder_of(kind), device="cpu", dtype="float32", lora=files)
        plain = Pipeline.load(folder_of(kind), device="cpu", dtype="float32")
        options = {"num_inference_steps": 1, "sampler": "euler", "guidance_scale": 1.0}
        assert pipe("dog", **options).images[0].tobytes() != plain("dog", **options).images[0].tobytes()
        assert pipe.model.recommended.sampler == "lcm"
        return
    pipe = Pipeline.load(tmp_path / "out" / "diffusers", device="cpu", dtype="float32")
    assert pipe.model.guidance_embedding_dim == 16
    assert pipe.model.classes[:4] == ("cat", "tabby", "dog", "bird")
    few, much = (pipe("dog", guidance_scale=scale, num_inference_steps=1).images[0] for scale in (1.0, 4.0))
    assert few.tobytes() != much.tobytes()


def test_a_picture_is_of_the_class_of_the_nearest_real_one():
    real = torch.eye(3)
    score = class_alignment(["a", "b", "b", "c"], real, ["a", "b", "c"])
    found = score(torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.0, 0.2], [0.9, 0.1, 0.0], [0.0, 0.0, 2.0]]))
    assert found == {"alignment": 0.75}


def test_the_recipes_teacher_paints_as_large_as_it_learns():
    assert build_unet(16).config.sample_size == load_shipped()[0].shape[-1] == 16


@pytest.mark.slow
def test_the_recipe_makes_a_teacher_whose_student_is_scored_by_group(tmp_path):
    """On the drawings that come with the embedded model, whose VAE it has."""
    work = tmp_path / "work"
    assert main(["recipe", "classes", "--work", str(work), "--effort", "0.0005"]) == 0
    words = ["distill", "--teacher", str(work / "model"), "--data", "emoji", "--output", str(tmp_path / "out")]
    words += [*QUICK, "--student", "full", "--steps", "1", "--samples", "8", "--shard-size", "4096"]
    assert main(words) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {row["role"] for row in rows} == {"teacher", "student"}
    assert all(0 <= row["alignment"] <= 1 for row in rows)
    assert Pipeline.load(tmp_path / "out" / "diffusers", device="cpu").model.classes[2] == "animals"
