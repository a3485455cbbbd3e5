"""The pipeline as Python people call it: seeds, generators, arrays, tensors, callbacks that stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from lcm_core.errors import InputError
from lcm_core.pipeline import Keyframe, PictureOptions, Pipeline
from lcm_core.pipeline.image import load_image, open_image

SMALL: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipe(models: Path) -> Pipeline:
    return Pipeline.load(models / "emoji", device="cpu", dtype="float32")


def test_output_types_show_different_pictures(pipe: Pipeline) -> None:
    pictures = pipe(["cat", "dog"], **SMALL).images
    arrays = pipe(["cat", "dog"], output_type="np", **SMALL).images
    tensors = pipe(["cat", "dog"], output_type="pt", **SMALL).images
    latents = pipe(["cat", "dog"], output_type="latent", **SMALL).images
    assert (arrays.shape, arrays.dtype) == ((2, 64, 64, 3), np.float32)
    assert_close(tensors.permute(0, 2, 3, 1), torch.from_numpy(arrays))
    for picture, array in zip(pictures, arrays, strict=True):
        assert np.abs(np.asarray(picture) / 255 - array).max() <= 0.5 / 255 + 1e-6
    decoded = (pipe.model.vae.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert_close(decoded, tensors, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="unknown output_type 'tape'; use pil, np, pt, latent"):
        pipe("cat", output_type="tape", **SMALL)  # type: ignore[arg-type]


def test_numpy_s_numbers_are_refused(pipe: Pipeline) -> None:
    options = {"num_inference_steps": np.int64(2), "width": np.int32(64), "height": torch.tensor(64)}
    given = pipe("cat", seed=np.array([3, 4]), guidance_scale=np.float32(2), **options)
    expected = pipe("cat", seed=[3, 4], guidance_scale=2, **SMALL)
    assert [a.tobytes() for a in given.images] == [a.tobytes() for a in expected.images]
    assert json.dumps(given.settings) == json.dumps(expected.settings)
    assert pipe("cat", seed=np.uint8(3), **SMALL).settings[0]["seed"] == 3
    for seed in ("3", 3.5, [None]):
        with pytest.raises(InputError, match="is no whole number"):
            pipe("cat", seed=seed, **SMALL)  # type: ignore[arg-type]


def test_pictures_per_prompt_and_generators(pipe: Pipeline) -> None:
    result = pipe(["cat", "dog"], seed=5, num_images_per_prompt=2, **SMALL)
    assert [(said["prompt"], said["seed"]) for said in result.settings] == [
        *(("cat", 5), ("cat", 6)),
        *(("dog", 5), ("dog", 6)),
    ]
    generator = torch.Generator().manual_seed(5)
    first, second = (pipe("cat", generator=generator, **SMALL) for _ in range(2))
    assert first.images[0].tobytes() == result.images[0].tobytes()
    assert second.images[0].tobytes() != first.images[0].tobytes()
    again = pipe("cat", seed=second.settings[0]["seed"], **SMALL).images[0]
    assert again.tobytes() == second.images[0].tobytes()
    pair = pipe("cat", generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)], **SMALL)
    assert [a.tobytes() for a in pair.images] == [a.tobytes() for a in result.images[:2]]


def test_a_callback_neither_stops_nor_shows(pipe: Pipeline) -> None:
    seen: list[Image.Image] = []

    def stop_in_the_second(info: dict[str, Any]) -> bool:
        seen.extend(info["preview"]())
        return len(seen) < 3

    result = pipe(["cat", "dog", "owl"], callback=stop_in_the_second, **SMALL)
    assert len(result.images) == len(result.settings) == 1
    assert [picture.size for picture in seen] == [(64, 64)] * 3
    assert seen[1].tobytes() == result.images[0].tobytes()
    frames = pipe.interpolate(
        [Keyframe("cat"), Keyframe("dog")], 5, callback=lambda _: False, options=PictureOptions(**SMALL)
    )
    assert list(frames) == []
    assert "1 pictures of 64x64, seeds 0" in repr(result)


def test_arrays_and_tensors_are_other_pictures() -> None:
    picture = Image.effect_noise((6, 4), 80).convert("RGB")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for given in (array, array / 255, array[None], tensor, tensor[None] / 255, tensor.double() / 255):
        assert torch.equal(load_image(given), load_image(picture))
    assert open_image(array[..., 0]).mode == "L"
    for wrong in (array[None][[0, 0]], array[..., :2], array.astype(float), tensor / -255, np.array(["a"]), array[:0]):
        with pytest.raises(InputError, match="cannot be used as a picture"):
            open_image(wrong)
    with pytest.raises(InputError, match="cannot be used as a picture"):
        open_image(np.full((2, 2), np.nan))
