"""Pictures in and out: tensors, settings inside the file, grids, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from lcm_core.errors import InputError
from lcm_core.pipeline.image import (
    encode_image,
    labelled_grid,
    load_image,
    load_mask,
    parameters_text,
    read_settings,
    save_image,
    to_pil,
)

SETTINGS = {
    "prompt": "un café, 日本 🍕",
    "num_inference_steps": 4,
    "guidance_scale": 1.5,
    "seed": 7,
    "width": 64,
    "height": 48,
}


def picture(seed: int = 0, width: int = 64, height: int = 48) -> Image.Image:
    array = numpy.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=numpy.uint8)
    return Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)


def test_tensor_and_picture_are_each_others_inverse() -> None:
    image = picture()
    tensor = load_image(image)
    assert tensor.shape == (1, 3, 48, 64)
    assert_close(tensor[0, :, 5, 7], torch.tensor(image.getpixel((7, 5))) / 127.5 - 1)
    assert to_pil(tensor)[0].tobytes() == image.tobytes()


def test_values_outside_the_range_are_clipped_not_wrapped() -> None:
    extreme = torch.tensor([-3.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert [image.getpixel((0, 0)) for image in to_pil(extreme)] == [(0, 0, 0), (255, 255, 255)]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    """A phone's portrait is stored lying down, with a tag that says so."""
    image = Image.new("RGB", (16, 8), "red")
    image.paste("blue", (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / "phone.png", exif=exif)
    tensor = load_image(tmp_path / "phone.png")
    assert tensor.shape == (1, 3, 16, 8)
    assert tensor[0, 0, 0, 0] == 1  # red on top
    assert tensor[0, 2, -1, 0] == 1  # blue below


def test_transparency_is_white_in_a_picture_and_kept_in_a_mask() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 255, 255, 255))
    assert load_image(image).flatten().tolist() == [1.0] * 6
    assert load_mask(image).flatten().tolist() == [0.0, 1.0]


def test_sixteen_bit_greys_are_scaled_not_clipped() -> None:
    image = Image.fromarray(numpy.full((2, 2), 32768, dtype=numpy.uint16))
    assert_close(load_image(image), torch.zeros(1, 3, 2, 2), atol=0.01, rtol=0)


def test_resize_crops_about_the_centre_and_keeps_proportions() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    tensor = load_image(image, (50, 50))
    assert tensor.shape == (1, 3, 50, 50)
    assert tensor[..., 2:-2].min() > 0.9  # only the white middle third is left


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_settings_come_back_from_the_file(tmp_path: Path, name: str) -> None:
    save_image(picture(), tmp_path / name, SETTINGS)
    assert read_settings(tmp_path / name) == SETTINGS
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_other_tools_read_the_parameters(tmp_path: Path) -> None:
    settings = {**SETTINGS, "negative_prompt": "dull", "sampler": "lcm", "model": "a, b"}
    save_image(picture(), tmp_path / "a.png", settings)
    text = Image.open(tmp_path / "a.png").text["parameters"]
    last = 'Steps: 4, Sampler: LCM, CFG scale: 1.5, Seed: 7, Model: "a, b", Size: 64x48'
    assert text.splitlines() == [SETTINGS["prompt"], "Negative prompt: dull", last]
    assert parameters_text(settings) == text


def test_the_same_picture_gives_the_same_bytes() -> None:
    for suffix in (".png", ".jpg", ".webp"):
        shuffled = dict(reversed(SETTINGS.items()))
        assert encode_image(picture(), suffix, SETTINGS) == encode_image(picture(), suffix, shuffled)


def test_a_png_of_another_program_is_named(tmp_path: Path) -> None:
    picture().save(tmp_path / "other.png")
    with pytest.raises(InputError, match=r"other\.png holds no settings"):
        read_settings(tmp_path / "other.png")


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    whole = io.BytesIO()
    picture().save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:200])
    for name in ("text.png", "cut.png"):
        with pytest.raises(InputError, match=rf"cannot read .*{name}.*PNG, JPEG or WebP"):
            load_image(tmp_path / name)
    with pytest.raises(InputError, match=r"absent\.png does not exist"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(InputError, match=r"'\.tiff'; use \.png"):
        save_image(picture(), tmp_path / "a.tiff")


def test_grid_places_every_picture_and_writes_the_labels() -> None:
    rows = [[Image.new("RGB", (96, 96), colour) for colour in row] for row in (("red", "lime"), ("blue", "yellow"))]
    sheet = labelled_grid(rows, ["teacher, 25 steps", "LCM, 4 steps"], ["a first prompt", "a very long prompt " * 12])
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)):
        assert colours[colour] == 96 * 96
    grey = numpy.asarray(sheet.convert("L"))
    for box in (grey[:28, :104], grey[:28, 104:], grey[30:50], grey[156:290]):  # two columns' heads, two rows' titles
        assert (box < 160).sum() > 100


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """The limit on file size stands for the disk: the write fails half-way."""
    resource = pytest.importorskip("resource")
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(InputError, match=r"cannot write .*a\.png: .*free some space"):
            save_image(noise, tmp_path / "a.png", SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_settings_are_plain_json_in_the_png(tmp_path: Path) -> None:
    save_image(picture(), tmp_path / "a.png", SETTINGS)
    assert json.loads(Image.open(tmp_path / "a.png").text["lcm_suite"]) == SETTINGS
