"""Buckets, crops and augmentation: what the student sees, and what SDXL is told about it."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lcm_core.errors import InputError
from trainer.data.augment import make_variant, recolour
from trainer.data.buckets import choose_bucket, fit_window, make_buckets
from trainer.data.settings import DataConfig

PHOTOS = DataConfig(path="photos")


def gradient(width, height):
    """Red grows to the right, green downwards, so that every pixel tells where it came from."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def test_buckets_of_sdxl_are_those_that_it_was_trained_with():
    """A part of the table in arXiv 2307.01952 App. I, which lists (height, width)."""
    published = [(1024, 1024), (1088, 960), (1152, 896), (1216, 832), (1344, 768), (1472, 704), (1536, 640)]
    buckets = make_buckets(1024, 64, max_aspect=2.5)
    assert {(height, width) for width, height in buckets} >= set(published)


@given(st.integers(1, 12), st.sampled_from([8, 32, 64]), st.floats(1, 4))
@settings(deadline=None)
def test_buckets_fit_the_network_the_area_and_the_aspect(sides, multiple, max_aspect):
    resolution = sides * multiple
    buckets = make_buckets(resolution, multiple, max_aspect)
    assert (resolution, resolution) in buckets
    for width, height in buckets:
        assert width % multiple == height % multiple == 0
        assert width * height <= resolution**2
        assert max(width, height) <= max_aspect * min(width, height)
        assert (height, width) in buckets


def test_a_resolution_that_the_network_cannot_halve_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"multiples of 64, e\.g\. 512x512"):
        make_buckets(500, 64)


def test_a_picture_goes_to_the_bucket_of_its_shape():
    buckets = make_buckets(512, 64)
    assert choose_bucket((3000, 3001), buckets) == (512, 512)
    assert choose_bucket((4000, 3000), buckets) == (576, 448)
    assert choose_bucket((300, 400), buckets) == (448, 576)
    assert choose_bucket((10000, 10), buckets) == max(buckets, key=lambda b: b[0] / b[1])


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.floats(0.1, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
@settings(deadline=None)
def test_windows_lie_inside_the_picture_and_have_the_targets_shape(size, keep, x, y):
    target = choose_bucket(size, make_buckets(512, 64))
    try:
        window = fit_window(size, target, keep, x, y)
    except InputError:
        assert min(size) <= 10  # fewer than half a pixel is left of the thin side
        return
    left, top, right, bottom = window.box
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    width, height = right - left, bottom - top
    assert abs(width * target[1] - height * target[0]) <= max(target)  # as nearly as whole pixels allow


def test_time_ids_are_original_size_crop_and_target_in_pixels_of_the_scaled_picture():
    """As the reference training of SDXL gives them: scaled to cover the target, then cropped from (top, left)."""
    window = fit_window((2000, 1000), (512, 512))  # scaled to 1024x512, of which 256 are cut on both sides
    assert window.time_ids == (1000, 2000, 0, 256, 512, 512)
    corner = fit_window((1000, 1000), (512, 512), keep=0.5, x=1.0, y=0.0)  # scaled to 1024x1024
    assert corner.time_ids == (1000, 1000, 0, 512, 512, 512)
    assert corner.mirrored().time_ids == (1000, 1000, 0, 0, 512, 512)


def test_variant_0_is_the_picture_scaled_by_lanczos_and_cropped_at_the_centre():
    picture = gradient(200, 100)
    image, window = make_variant(picture, "a", 0, [(64, 64)], replace(PHOTOS, flip=True, crop=0.5, colour=0.5))
    expected = picture.crop((50, 0, 150, 100)).resize((64, 64), Image.Resampling.LANCZOS)
    torch.testing.assert_close(image[0].permute(1, 2, 0), torch.tensor(np.array(expected)) / 127.5 - 1)
    assert window.time_ids == (100, 200, 0, 32, 64, 64)


def test_odd_variants_are_mirrored_with_their_window():
    picture, config = gradient(200, 100), replace(PHOTOS, flip=True)
    plain, window = make_variant(picture, "a", 0, [(64, 64)], config)
    mirrored, other = make_variant(picture, "a", 1, [(64, 64)], config)
    torch.testing.assert_close(mirrored, plain.flip(-1), rtol=0, atol=0)
    assert other.crop == window.crop == (0, 32)
    again, _ = make_variant(picture, "a", 2, [(64, 64)], config)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_a_random_crop_shows_the_place_that_its_window_names():
    """Where the pixels came from is read off their colours."""
    picture, config = gradient(256, 256), replace(PHOTOS, crop=0.5, flip=True)
    crops = set()
    for variant in range(1, 6):
        image, window = make_variant(picture, "a", variant, [(64, 64)], config)
        left, top, right, bottom = window.mirrored().box if variant % 2 else window.box
        assert 128 <= right - left == bottom - top <= 256
        seen = (image.flip(-1) if variant % 2 else image)[0, :2] * 127.5 + 127.5  # red and green are x and y
        torch.testing.assert_close(seen[:, 0, 0], torch.tensor([left, top]).float(), rtol=0, atol=4)
        torch.testing.assert_close(seen[:, -1, -1], torch.tensor([right, bottom]).float(), rtol=0, atol=4)
        crops.add(window.box)
    assert len(crops) == 5


def test_what_is_random_depends_on_name_number_and_seed_alone():
    picture, config = gradient(256, 256), replace(PHOTOS, crop=0.5)

    def box(key, variant, seed=0):
        return make_variant(picture, key, variant, [(64, 64)], replace(config, teacher_seed=seed))[1].box

    assert box("a", 1) == box("a", 1)
    assert len({box("a", 1), box("a", 2), box("b", 1), box("a", 1, seed=1)}) == 4


def test_recolouring_follows_its_definitions():
    """Brightness adds, contrast spreads about the grey mean, saturation 0 is grey, hue turns red into green."""
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(recolour(red, [0, 0, 0, 0]), red, rtol=0, atol=1e-6)
    brighter = recolour(torch.zeros(1, 3, 4, 4), [0.1, 0, 0, 0])
    torch.testing.assert_close(brighter, torch.full((1, 3, 4, 4), 0.2))
    flat = recolour(torch.rand(1, 3, 4, 4), [0, -1, 0, 0])
    torch.testing.assert_close(flat, flat.mean().expand(1, 3, 4, 4))
    grey = recolour(red, [0, 0, -1, 0])
    torch.testing.assert_close(grey[:, 0], grey[:, 1])
    green = recolour(red, [0, 0, 0, 2 / 3])
    torch.testing.assert_close(green, red[:, [1, 0, 2]], rtol=0, atol=1e-5)


def test_without_kornia_colours_are_refused_and_the_rest_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    make_variant(gradient(64, 64), "a", 1, [(64, 64)], replace(PHOTOS, flip=True, crop=0.5))
    with pytest.raises(InputError, match="kornia"):
        make_variant(gradient(64, 64), "a", 1, [(64, 64)], replace(PHOTOS, colour=0.1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": ""}, "neither"),
        ({"prompts": "p.txt"}, "both"),
        ({"resolution": -1}, "resolution -1"),
        ({"crop": 0.0}, "crop 0.0"),
        ({"colour": float("nan")}, "colour nan"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"variants": 3}, "3 variants would all be alike"),
        ({"variants": 1, "flip": True}, "1 variant is the plain picture"),
        ({"path": "", "prompts": "p.txt", "flip": True}, "are for images"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(PHOTOS, **change).check()


def test_variants_follow_from_the_augmentation():
    counts = [replace(PHOTOS, **change).check().variant_count for change in ({}, {"flip": True}, {"crop": 0.9})]
    assert counts == [1, 2, 4]
    assert replace(PHOTOS, path="", prompts="p.txt", variants=3).check().variant_count == 3
