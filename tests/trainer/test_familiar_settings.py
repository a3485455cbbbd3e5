"""What people who make models expect of a trainer: names, files and settings that they know from others."""

import json
import tarfile
from dataclasses import replace
from typing import ClassVar

import accelerate.tracking
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup
from PIL import Image
from transformers import CLIPTextModel

from lcm_core.errors import InputError
from lcm_core.pipeline.model import load_model
from lcm_core.pipeline.sources import MODELS, find_model
from tests.embedded import embedded_vae
from trainer.cli.main import build_parser
from trainer.config import DistillConfig
from trainer.data.cache import Pick, prepare
from trainer.data.settings import DataConfig
from trainer.data.tars import read_tars
from trainer.data.teacher import Teacher
from trainer.loop import LoopConfig, learning_rate_at, train
from trainer.methods.config import TcdConfig
from trainer.options import describe_run, resolve
from trainer.report.preview import paint_previews, preview_grid
from trainer.report.prompts import read_prompts
from trainer.setup import examine

EMOJI = MODELS / "emoji"


def given(*words):
    return resolve(build_parser().parse_args(["distill", *map(str, words)]))


def test_the_learning_rate_has_the_name_that_others_give_it():
    assert given("--lr", "3e-5").training.learning_rate == 3e-5


@pytest.mark.parametrize(
    ("name", "make"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_schedules_are_those_of_diffusers(name, make):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = make(optimizer, 0, 20)
    config = LoopConfig(steps=20, batch_size=1, learning_rate=0.1, warmup_steps=0, lr_schedule=name)
    for step in range(20):
        assert learning_rate_at(step, config) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_a_constant_rate_stays_behind_the_warm_up():
    config = LoopConfig(steps=20, batch_size=1, learning_rate=1.0, warmup_steps=4, lr_schedule="constant")
    assert [learning_rate_at(step, config) for step in (0, 3, 4, 19)] == [0.25, 1.0, 1.0, 1.0]


def test_an_unknown_schedule_is_refused(photos):
    with pytest.raises(InputError, match="unknown lr_schedule 'poly'; choose trapezoid, constant, linear, cosine"):
        examine(given("--preset", "emoji", "--lr-schedule", "poly"))


def test_the_settings_of_a_run_are_a_file_that_gives_them_again(tmp_path):
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    config = replace(DistillConfig(), name='é "🍕"\n\x7f\\', method=TcdConfig(w_min=1.0))
    config = replace(config, report=replace(config.report, preview_prompts=("a cat", "ein Hund")))
    file = tmp_path / "run.toml"
    file.write_text(describe_run(config), encoding="utf-8")
    assert resolve(build_parser().parse_args(["distill", "--config", str(file)])) == config
    assert len(tomllib.loads(file.read_text())["training"]) == len(config.training.__dataclass_fields__)
    assert "# Width of the LoRA.\nrank = 64\n" in file.read_text()


def test_a_model_in_the_hub_cache_is_found_by_its_name(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert find_model("me/tiny") == snapshot
    with pytest.raises(InputError, match=r"no folder me/other, nor such a model in Hugging Face's cache"):
        find_model("me/other")


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    vae = embedded_vae()
    with torch.no_grad():
        vae.quant_conv.bias += 0.5
    vae.save_pretrained(folder)
    return folder


def test_latents_are_those_of_another_vae_where_one_is_given(photos, other_vae, tmp_path):
    config = DataConfig(path=str(photos), resolution=64)
    own, other = (
        prepare(config, Teacher("emoji", vae=vae), tmp_path, "cpu").read([Pick("8x8", 0, False)]).latents
        for vae in (None, other_vae)
    )
    scale = json.loads((EMOJI / "vae" / "config.json").read_text())["scaling_factor"]
    torch.testing.assert_close(other, own + 0.5 * scale, rtol=0, atol=5e-3)


def test_a_vae_of_another_family_is_refused(tmp_path, photos):
    AutoencoderKL(latent_channels=8, block_out_channels=(32,)).save_pretrained(tmp_path)
    words = ["--teacher", "emoji", "--data", photos, "--output", tmp_path / "out", "--vae", tmp_path]
    with pytest.raises(InputError, match="gives 8 channels, but the U-Net of emoji takes 4"):
        examine(given(*words))


def test_clip_skip_leaves_out_the_last_layers(photos, tmp_path):
    cache = prepare(DataConfig(path=str(photos), resolution=64), Teacher("emoji", clip_skip=1), tmp_path, "cpu")
    found = cache.read([Pick("8x8", 0, True)]).conditioning["encoder_hidden_states"]
    model = CLIPTextModel.from_pretrained(EMOJI / "text_encoder").float().eval()
    words = Teacher("emoji")._tokenizer("text_encoder")("", padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        states = model(words["input_ids"], output_hidden_states=True).hidden_states[-2]
        norm = getattr(model, "text_model", model).final_layer_norm
        expected = norm(states)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    plain = prepare(
        DataConfig(path=str(photos), resolution=64), "emoji", tmp_path, "cpu"
    )  # in the same folder, not mixed
    assert not torch.equal(plain.read([Pick("8x8", 0, True)]).conditioning["encoder_hidden_states"], found)


def test_preview_prompts_have_the_switches_of_other_trainers():
    plain, full = read_prompts(["a cat", "a dog, 5--6 --n blurry, dark --d 42 --w 64 --h 128 --l 1.5"])
    assert plain.said == {"prompt": "a cat", "seed": 0}
    assert full.said == {
        "prompt": "a dog, 5--6",
        "negative_prompt": "blurry, dark",
        "seed": 42,
        "width": 64,
        "height": 128,
        "guidance_scale": 1.5,
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --s 4", "unknown switch --s; use --n"),
        ("a cat --d 4.5", "--d 4.5 is no number"),
        ("a cat --l nan", "--l nan is no number"),
    ],
)
def test_a_bad_switch_is_named(line, message):
    with pytest.raises(InputError, match=message):
        examine(given("--preset", "emoji", "--preview-prompts", line))


def test_previews_have_the_seed_and_size_of_their_prompt():
    model = load_model("emoji", "cpu", unet="lcm")
    lines = ["a cat", "a cat --d 7 --w 64 --h 64", "a cat --d 8 --w 64 --h 64"]
    (column,) = paint_previews(model, read_prompts(lines), range(3), [1]).values()
    assert [image.size for image, _ in column] == [(128, 128), (64, 64), (64, 64)]
    assert [settings["seed"] for _, settings in column] == [0, 7, 8]
    grid = preview_grid(model, read_prompts(lines), range(3), [1])
    assert 128 + 64 + 64 < grid.height < 128 * 3  # rows are as high as their pictures


class Recorder:
    """Stands for accelerate's wandb tracker; the library itself is not here, and would call its server."""

    requires_logging_directory = False
    seen: ClassVar[list] = []

    def __init__(self, run_name):
        self.run_name = run_name

    def start(self):
        self.seen.append(("start", self.run_name))

    def log(self, values, step):
        self.seen.append((step, *values))

    def finish(self):
        self.seen.append(("finish",))


def test_curves_go_to_accelerates_trackers(tmp_path, monkeypatch):
    Recorder.seen.clear()
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    loop = LoopConfig(steps=2, batch_size=1, learning_rate=0.1, trackers=("wandb",), tensorboard=False)
    model = torch.nn.Linear(1, 1)
    train(model, lambda step, generator: model.weight.square().sum(), loop, tmp_path / "mine" / "run")
    names = ("loss", "learning_rate", "images/s")
    assert Recorder.seen == [("start", "mine"), (0, *names), (1, *names), ("finish",)]


@pytest.mark.parametrize(("name", "message"), [("wandb", "wandb is not installed"), ("w&b", "unknown tracker 'w&b'")])
def test_a_tracker_that_is_not_here_is_told_before_the_work(name, message, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(InputError, match=message):
        examine(given("--preset", "emoji", "--trackers", name))


def test_pictures_of_other_kinds_in_a_tar_are_refused_by_name(tmp_path):
    for name in ("1.png", "2.gif", "2.txt"):
        (tmp_path / name).write_text("x")
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for name in ("1.png", "2.gif", "2.txt"):
            tar.add(tmp_path / name, name)
    assert read_tars([tmp_path / "data.tar"]).skipped == [
        ("data.tar/2.gif", ".gif files are not read; convert it to .png or .jpg")
    ]


def test_webp_cmyk_and_sixteen_bits_become_the_picture_that_they_are(tmp_path):
    """Flat grey, through each format and the VAE; 16-bit greys were once clipped to white."""
    Image.new("RGB", (64, 64), (100, 100, 100)).save(tmp_path / "a.png")
    Image.new("RGB", (64, 64), (100, 100, 100)).save(tmp_path / "b.webp", lossless=True)
    Image.new("CMYK", (64, 64), (155, 155, 155, 0)).save(tmp_path / "c.tif")
    Image.fromarray(np.full((64, 64), 100 * 257, np.uint16)).save(tmp_path / "d.png")
    cache = prepare(DataConfig(path=str(tmp_path), resolution=64), "emoji", tmp_path / "cache", "cpu")
    latents = cache.read([Pick("8x8", row, False) for row in range(4)]).latents
    torch.testing.assert_close(latents, latents[:1].expand_as(latents), rtol=0, atol=2e-3)
