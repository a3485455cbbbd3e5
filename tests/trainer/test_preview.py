"""Preview pictures: the same prompts and seeds give the same pictures, and each file can be made again."""

import numpy
import torch
from PIL import Image

from lcm_core.pipeline import Pipeline
from lcm_core.pipeline.image import read_settings
from lcm_core.pipeline.model import load_model
from lcm_core.pipeline.options import parse_options
from lcm_core.pipeline.settings import Settings
from trainer.report.preview import paint_previews, preview_grid, read_samples, save_samples

PROMPTS, SEEDS = ["red apple, noto style", "a cat, fluent style"], [4, 9]


def pixels(image: Image.Image) -> numpy.ndarray:
    return numpy.asarray(image.convert("RGB"))


def test_previews_are_the_pictures_that_the_pipeline_paints() -> None:
    model = load_model("emoji", "cpu", unet="lcm")
    previews = paint_previews(model, PROMPTS, SEEDS, [1, 2], guidance_scale=3.0)
    assert list(previews) == [1, 2]
    image, settings = previews[2][1]
    expected = Pipeline(model)(PROMPTS[1], seed=9, num_inference_steps=2, guidance_scale=3.0).images[0]
    # a batch of two and one of one may differ in the last bit of a float
    assert numpy.abs(pixels(image).astype(int) - pixels(expected)).max() <= 1
    assert (settings["prompt"], settings["seed"], settings["guidance_scale"]) == (PROMPTS[1], 9, 3.0)


def test_a_grid_has_a_row_for_each_prompt_and_a_column_for_each_number_of_steps() -> None:
    model = load_model("emoji", "cpu", unet="lcm")
    torch.manual_seed(1)
    first = preview_grid(model, PROMPTS, SEEDS, [1, 2])
    torch.manual_seed(2)  # the global generator must not matter
    assert pixels(preview_grid(model, PROMPTS, SEEDS, [1, 2])).tobytes() == pixels(first).tobytes()
    one = preview_grid(model, PROMPTS[:1], SEEDS[:1], 1)
    assert first.width - one.width >= model.resolution
    assert first.height - one.height >= model.resolution


def test_samples_come_back_with_role_steps_prompt_and_what_makes_them_again(tmp_path) -> None:
    model = load_model("emoji", "cpu", unet="teacher")
    save_samples(tmp_path, "teacher-of-old", model, PROMPTS, SEEDS, [1], sampler="euler")
    samples = read_samples(tmp_path)
    assert [(s.role, s.steps, s.index) for s in samples] == [("teacher-of-old", 1, 0), ("teacher-of-old", 1, 1)]
    settings = read_settings(samples[0].path)
    assert settings == samples[0].settings
    again = next(Pipeline(model).paint([parse_options(settings).over(Settings())]))
    assert numpy.abs(pixels(again).astype(int) - pixels(Image.open(samples[0].path))).max() <= 1
