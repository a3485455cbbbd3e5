"""The pipeline on tiny random models, against diffusers and against itself."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional
from torch.testing import assert_close

from lcm_core.diffusion.samplers import initial_noise
from lcm_core.errors import InputError
from lcm_core.pipeline import Keyframe, PictureOptions, Pipeline
from lcm_core.pipeline.image import load_image
from tests.core.references import diffusers_pipeline


def pixels(image: Image.Image) -> bytes:
    return image.tobytes()


def as_tensor(image: Image.Image) -> torch.Tensor:
    return (load_image(image) + 1) / 2


def test_text_to_image_equals_diffusers_latent_consistency_pipeline(lcm: Pipeline, models: Path) -> None:
    reference = diffusers_pipeline("LatentConsistencyModelPipeline", models / "lcm")
    expected = reference(
        "a red cat", 64, 128, 4, guidance_scale=5.0, generator=torch.Generator().manual_seed(3), output_type="pt"
    ).images
    result = lcm("a red cat", height=64, width=128, num_inference_steps=4, guidance_scale=5.0, seed=3)
    assert_close(as_tensor(result.images[0]), expected, rtol=0, atol=0.6 / 255)


def test_image_to_image_starts_from_the_picture_noised_to_the_strength(lcm: Pipeline) -> None:
    """At a low strength the picture must stay close to what the VAE makes of it; at a high one it must not."""
    source = Image.new("RGB", (64, 64), (200, 40, 90))
    latents = lcm.model.vae.encode(load_image(source))
    kept = as_tensor_of(lcm.model.vae.decode(latents))
    distances = [
        (as_tensor(lcm("a cat", image=source, strength=strength, num_inference_steps=1).images[0]) - kept).abs().mean()
        for strength in (0.02, 0.5, 1.0)
    ]
    assert distances[0] < distances[1] < distances[2]


def as_tensor_of(decoded: torch.Tensor) -> torch.Tensor:
    return (decoded + 1) / 2


@pytest.mark.parametrize("sampler", ["lcm", "tcd", "euler", "dpmpp_2m", "dpm_2m"])
def test_inpainting_keeps_what_is_not_masked_to_the_last_bit(lcm: Pipeline, sampler: str) -> None:
    source = Image.effect_noise((64, 64), 60).convert("RGB")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    painted = lcm("a cat", image=source, mask=mask, num_inference_steps=2, sampler=sampler).images[0]
    inside = (16, 16, 48, 48)
    assert pixels(painted.crop(inside)) != pixels(source.crop(inside))
    painted.paste(source.crop(inside), inside)
    assert pixels(painted) == pixels(source)


def test_a_picture_depends_on_its_own_seed_alone(lcm: Pipeline) -> None:
    """Bit for bit, whatever is painted beside it."""
    together = lcm("a cat", seed=[4, 5, 6]).images
    alone = lcm("a cat", seed=5).images[0]
    assert pixels(together[1]) == pixels(alone)
    assert pixels(together[0]) != pixels(alone)


def test_batches_change_nothing_that_can_be_seen(lcm: Pipeline) -> None:
    alone, batched = (lcm(["a", "b", "c"], seed=[4, 5, 6], batch_size=size).images for size in (1, 2))
    for one, other in zip(alone, batched, strict=True):
        assert_close(as_tensor(one), as_tensor(other), rtol=0, atol=1.5 / 255)


def test_second_pass_enlarges_the_first(lcm: Pipeline) -> None:
    """The second run starts from the first one's latents, twice as large, noised to its strength with fresh noise."""
    seen: list[dict] = []
    result = lcm("a cat", seed=1, num_inference_steps=2, upscale=2, upscale_strength=0.4, callback=seen.append)
    assert result.images[0].size == (128, 128)
    assert [info["x"].shape[-1] for info in seen] == [8, 8, 16, 16]
    enlarged = functional.interpolate(seen[1]["denoised"], scale_factor=2, mode="bicubic")
    noise = (seen[2]["x"] - enlarged) / seen[2]["sigma"]
    assert float(seen[2]["sigma"]) == pytest.approx(float(lcm.model.diffusion.process.sigmas[20 * 20 - 1]))
    assert_close(noise.std(), torch.tensor(1.0), rtol=0.1, atol=0)
    first = initial_noise([1], noise.shape[1:])
    assert abs(float((noise * first).mean())) < 0.1


def test_guidance_goes_where_the_model_wants_it(lcm: Pipeline, plain: Pipeline) -> None:
    """A full LCM reads it as an embedding and ignores the negative prompt; a plain model runs a negative pass."""
    one, two = (pixels(lcm("a cat", guidance_scale=scale).images[0]) for scale in (3, 9))
    assert one != two
    assert pixels(lcm("a cat", negative_prompt="dog", guidance_scale=3).images[0]) == one
    batches: list[int] = []
    network = plain.model.unet.model
    handle = network.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    try:
        unguided = plain("a cat", guidance_scale=1, num_inference_steps=2).images[0]
        assert batches == [1, 1]  # the negative pass is skipped
        negative = [plain("a cat", words, 2, guidance_scale=3).images[0] for words in ("", "dog")]
        assert batches[2:] == [2] * 4
    finally:
        handle.remove()
    assert len({pixels(image) for image in (unguided, *negative)}) == 3


def test_settings_are_the_models_unless_given(lcm: Pipeline, plain: Pipeline, models: Path) -> None:
    chosen = lcm.resolve(PictureOptions(prompt="x"))
    assert (chosen.sampler, chosen.num_inference_steps, chosen.guidance_scale) == ("lcm", 4, 4.0)
    assert (chosen.width, chosen.height, chosen.original_steps) == (64, 64, 50)
    assert plain.resolve(PictureOptions(prompt="x")).guidance_scale == 1.0
    assert not plain.model.recommended.is_distilled
    teacher = Pipeline.load(models / "emoji", device="cpu", dtype="float32", unet="teacher")
    chosen = teacher.resolve(PictureOptions(prompt="x"))
    assert (chosen.sampler, chosen.num_inference_steps, chosen.guidance_scale) == ("dpmpp_2m", 25, 3.0)
    wide = lcm.resolve(PictureOptions(prompt="x"), Image.new("RGB", (400, 100)))
    assert (wide.width, wide.height, wide.strength) == (128, 64, 0.6)


def test_custom_timesteps_are_walked(lcm: Pipeline) -> None:
    seen: list[float] = []
    result = lcm("a cat", timesteps=[999, 500, 20], callback=lambda info: seen.append(float(info["sigma"])))
    expected = lcm.model.diffusion.process.sigmas[[999, 500, 20]].tolist()
    assert seen == pytest.approx(expected)
    assert result.settings[0]["num_inference_steps"] == 3


@pytest.mark.parametrize("mode", ["slerp", "lerp"])
def test_frames_on_keyframes_equal_the_single_pictures_bit_for_bit(lcm: Pipeline, mode: str) -> None:
    """Prompt, first noise and the re-noise of every later step must all arrive."""
    keyframes = [Keyframe("a red cat", 1), Keyframe("a blue dog", 2), Keyframe("a tree", 3)]
    frames = list(lcm.interpolate(keyframes, 5, mode, "smooth"))
    singles = [lcm(keyframe.prompt, seed=keyframe.seed).images[0] for keyframe in keyframes]
    assert [pixels(frame) for frame in frames[::2]] == [pixels(single) for single in singles]
    assert len({pixels(frame) for frame in frames}) == 5


def test_a_closed_loop_starts_at_the_first_picture_and_returns_to_it(lcm: Pipeline) -> None:
    keyframes = [Keyframe("a cat", 1), Keyframe("a cat", 2)]
    frames = [as_tensor(frame) for frame in lcm.interpolate(keyframes, 6, loop=True)]
    first = as_tensor(lcm("a cat", seed=1).images[0])
    assert torch.equal(frames[0], first)
    steps = [(a - b).abs().mean() for a, b in zip(frames, [*frames[1:], first], strict=True)]
    assert max(steps) < 3 * min(steps)  # the seam is a step like any other


def test_later_noise_travels_too(lcm: Pipeline) -> None:
    """Neighbouring frames must be close; a fresh draw in each frame's later steps would make them jump."""
    near = list(islice(lcm.interpolate([Keyframe("a cat", 1), Keyframe("a cat", 2)], 41), 5))
    steps = [(as_tensor(a) - as_tensor(b)).abs().mean() for a, b in pairwise(near)]
    whole = (as_tensor(near[0]) - as_tensor(lcm("a cat", seed=2).images[0])).abs().mean()
    assert max(steps) < whole / 4


def test_image_latents_travel_between_input_pictures(lcm: Pipeline) -> None:
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "navy")]
    keyframes = [Keyframe("a cat", 1, picture) for picture in pictures]
    frames = list(lcm.interpolate(keyframes, 3, options=PictureOptions(strength=0.3, num_inference_steps=2)))
    singles = [lcm("a cat", seed=1, image=image, strength=0.3, num_inference_steps=2).images[0] for image in pictures]
    assert [pixels(frames[0]), pixels(frames[2])] == [pixels(single) for single in singles]
    assert pixels(frames[1]) not in [pixels(frames[0]), pixels(frames[2])]
    with pytest.raises(InputError, match="only some keyframes have an image"):
        list(lcm.interpolate([keyframes[0], Keyframe("a dog", 2)], 3))


def test_a_tiny_vae_can_take_the_place_of_the_models_own(models: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8)).save_pretrained(
        tmp_path / "tiny"
    )
    pipe = Pipeline.load(models / "emoji", device="cpu", dtype="float32", vae=tmp_path / "tiny")
    result = pipe("a cat", num_inference_steps=1)
    assert result.images[0].size == (64, 64)
    assert result.settings[0]["vae"] == str(tmp_path / "tiny")


def test_an_inf_on_the_way_is_an_error_not_a_black_picture(models: Path) -> None:
    pipe = Pipeline.load(models / "emoji", device="cpu", dtype="float32")
    with torch.no_grad():
        next(pipe.model.unet.model.conv_out.parameters()).fill_(float("inf"))
    with pytest.raises(InputError, match=r"computed NaN.*float32"):
        pipe("a cat")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 100}, r"100x64 does not fit.*multiples of 64.*128x64"),
        ({"height": 0}, r"64x0 is out of range"),
        ({"width": -64}, r"-64x64 is out of range"),
        ({"width": 10**6}, r"1000000x64 is out of range"),
        ({"num_inference_steps": 0}, r"0 steps are out of range.*1 to 50"),
        ({"num_inference_steps": 51}, r"51 steps are out of range.*original_steps"),
        ({"strength": 0.0, "image": "red"}, r"strength 0.0 is outside"),
        ({"strength": 1.5, "image": "red"}, r"strength 1.5 is outside"),
        ({"strength": float("nan"), "image": "red"}, r"strength nan is outside"),
        ({"strength": 0.5}, r"without an input image"),
        ({"strength": 0.02, "image": "red", "num_inference_steps": 4}, r"4 steps at strength=0.02"),
        ({"upscale": 9}, r"upscale 9"),
        ({"sampler": "heun"}, r"unknown sampler 'heun'.*lcm, tcd"),
        ({"guidance_scale": float("nan")}, r"guidance_scale nan"),
        ({"timesteps": [10, 500]}, r"fall"),
        ({"seed": 2**70}, r"seed .*64 bits"),
        ({"seed": [1, 2], "prompt": ["a", "b", "c"]}, r"3 prompts and 2 seeds"),
        ({"mask": "red"}, r"mask was given without an input image"),
    ],
)
def test_bad_settings_are_told_with_their_remedy(lcm: Pipeline, options: dict, words: str) -> None:
    for name in ("image", "mask"):
        if name in options:
            options = {**options, name: Image.new("RGB", (64, 64), options[name])}
    with pytest.raises(InputError, match=words):
        lcm(**{"prompt": "a cat", **options})


def test_models_that_are_not_there_are_told_with_what_is(models: Path) -> None:
    with pytest.raises(InputError, match=r"unknown model 'no-such-model'; give the path"):
        Pipeline.load("no-such-model")
    with pytest.raises(InputError, match="one U-Net only"):
        Pipeline.load(models / "plain", unet="teacher")
    with pytest.raises(InputError, match=r"LoRA 'absent.safetensors' does not exist"):
        Pipeline.load(models / "plain", lora=[("absent.safetensors", 1.0)])
