"""The cache of latents and text holds the right numbers, and batches are drawn from it as they should be."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from lcm_core.pipeline import Pipeline
from lcm_core.pipeline.image import to_pil
from lcm_core.pipeline.model import load_model
from tests.embedded import embedded_vae
from tests.trainer.cache.conftest import rows
from trainer.data.cache import Pick, prepare
from trainer.data.settings import DataConfig
from trainer.recipes.emoji.data import LATENT_STEPS, Drawing, load_shipped, save_shipped


def to_tensor(picture):
    return torch.tensor(np.array(picture)).float()


def reference_latents(path):
    """diffusers' own encoder on Pillow's own cover-and-crop."""
    vae = embedded_vae()
    picture = ImageOps.fit(Image.open(path).convert("RGB"), (64, 64), Image.Resampling.LANCZOS)
    pixels = torch.tensor(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        return (vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor)[0]


def test_latents_and_embeddings_are_those_of_diffusers_and_of_the_model(photos, made):
    cache = made[1]
    assert cache.buckets == {"8x8": 6}
    batch = rows(cache)
    for i in range(6):
        torch.testing.assert_close(batch.latents[i], reference_latents(photos / f"{i}.jpg"), rtol=1e-3, atol=2e-3)
    model = load_model("emoji", "cpu")
    words = ["", *(f"picture number {i}" for i in (1, 2, 3, 4, 4))]
    expected = model.encode(words, 64, 64)["encoder_hidden_states"]
    states = batch.conditioning["encoder_hidden_states"]
    torch.testing.assert_close(states, expected.half().float(), rtol=0, atol=0)
    nothing = model.encode([""] * 6, 64, 64)["encoder_hidden_states"].half().float()
    torch.testing.assert_close(batch.null_conditioning["encoder_hidden_states"], nothing, rtol=0, atol=0)
    assert batch.conditioning.keys() == {"encoder_hidden_states"}


def test_a_broken_picture_is_skipped_counted_and_named(made):
    folder, cache = made
    assert [name for name, _ in cache.skipped] == ["broken.jpg"]
    (report,) = folder.glob("latents-*/skipped.json")
    assert json.loads(report.read_text()) == [list(entry) for entry in cache.skipped]
    assert any("1 skipped" in note for note in cache.notes)
    assert any("2 of 7 pictures have no caption" in note for note in cache.notes)


def test_batches_come_from_the_generator_alone(made):
    cache = made[1]

    def draw(seed, dropout=0.0):
        return cache.batch(4, torch.Generator().manual_seed(seed), dropout)

    one, two = draw(1, 0.5), draw(1, 0.5)
    torch.testing.assert_close(one.latents, two.latents, rtol=0, atol=0)
    torch.testing.assert_close(one.conditioning, two.conditioning, rtol=0, atol=0)
    assert not torch.equal(draw(1).latents, draw(2).latents)
    everything = draw(3, 1.0)
    torch.testing.assert_close(everything.conditioning, everything.null_conditioning, rtol=0, atol=0)


def test_parts_of_a_batch_make_up_the_whole(made):
    """Two processes that share a batch must see what one would."""
    cache = made[1]
    picks = cache.draw(6, torch.Generator().manual_seed(0))
    assert len({pick.row for pick in picks}) == 6  # no picture twice
    whole, parts = cache.read(picks), [cache.read(picks[:2]), cache.read(picks[2:])]
    torch.testing.assert_close(torch.cat([part.latents for part in parts]), whole.latents, rtol=0, atol=0)


def test_a_batch_larger_than_its_bucket_repeats_pictures_evenly(made):
    picks = made[1].draw(14, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor([pick.row for pick in picks]), minlength=6)
    assert sorted(set(counts.tolist())) == [2, 3]


def test_buckets_are_drawn_in_proportion_to_their_pictures(photos, tmp_path):
    config = DataConfig(path=str(photos), resolution=192, max_aspect=3, cache_batch=2)
    cache = prepare(config, "emoji", tmp_path, "cpu")
    assert cache.buckets == {"24x24": 3, "16x32": 2, "32x16": 1}
    generator = torch.Generator().manual_seed(0)
    drawn = [cache.draw(2, generator) for _ in range(300)]
    assert all(len({pick.bucket for pick in picks}) == 1 for picks in drawn)
    for bucket, count in cache.buckets.items():
        share = sum(picks[0].bucket == bucket for picks in drawn) / 300
        assert abs(share - count / 6) < 0.09  # three standard deviations
        assert bucket == "x".join(str(side) for side in cache.read([Pick(bucket, 0, False)]).latents.shape[2:])


def test_variants_are_cached_beside_the_plain_picture(photos, tmp_path, config):
    cache = prepare(replace(config, flip=True), "emoji", tmp_path, "cpu")
    assert len(cache) == 12
    batch = rows(cache)
    plain = {tuple(latents.flatten().tolist()) for latents in batch.latents}
    assert len(plain) == 12
    torch.testing.assert_close(batch.latents[0], reference_latents(photos / "0.jpg"), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["emoji", "v_prediction"])
def test_prompts_alone_are_painted_as_the_pipeline_paints_them(tmp_path, teachers, kind):
    """Same seed, solver and guidance; the pipeline ends in pixels, so the latents are decoded first."""
    teacher = "emoji" if kind == "emoji" else teachers("v_prediction", True)  # with zero terminal SNR
    (tmp_path / "prompts.txt").write_text("a red apple, noto style\na cat\n")
    config = DataConfig(
        prompts=str(tmp_path / "prompts.txt"), variants=2, teacher_steps=3, teacher_guidance=3.0, teacher_seed=7
    )
    cache = prepare(config, teacher, tmp_path / "cache", "cpu")
    assert cache.examples == ["a red apple, noto style", "a cat"]
    pipe = Pipeline.load(teacher, "cpu", unet="teacher" if kind == "emoji" else None)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "sampler": "dpmpp_2m", "seed": [7, 8, 9, 10]}
    words = ["a red apple, noto style"] * 2 + ["a cat"] * 2
    expected = pipe(words, **options).images
    painted = [to_pil(pipe.model.vae.decode(latents[None]))[0] for latents in rows(cache).latents]
    for ours, theirs in zip(painted, expected, strict=True):  # in a batch of 4, networks round differently
        torch.testing.assert_close(to_tensor(ours), to_tensor(theirs), rtol=0, atol=1)
    states = pipe.model.encode(words, 64, 64)["encoder_hidden_states"].half().float()
    torch.testing.assert_close(rows(cache).conditioning["encoder_hidden_states"], states, rtol=0, atol=0)


def test_the_shipped_drawings_need_no_vae(tmp_path, monkeypatch):
    latents, drawing = torch.randint(-99, 99, (3, 4, 8, 8)) / LATENT_STEPS, ("1f355", "pizza", (), "food", "noto")
    entries = [Drawing(*drawing, held_out=i == 1) for i in range(4)]
    save_shipped(tmp_path, entries, latents, {"features": torch.zeros(4, 2)})
    monkeypatch.setattr("trainer.recipes.emoji.data.load_shipped", lambda: load_shipped(tmp_path))
    cache = prepare(DataConfig(path="emoji"), "emoji", tmp_path / "cache", "cpu")
    torch.testing.assert_close(rows(cache).latents, latents, rtol=0, atol=0)
    assert cache.examples == ["pizza, noto style"]


def test_shards_are_mapped_not_read(made):
    """Memory must not grow with the data."""
    shard = next(made[0].glob("text-*/0*.safetensors"))
    tensor = read_safetensors(shard)[0]["encoder_hidden_states"]
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(shard) in maps.read_text()
    assert tensor.dtype == torch.float16


def test_pictures_that_are_enlarged_are_counted(made):
    """One of 40 x 40 for 64 x 64; what is only cropped does not count."""
    assert any("1 of 7 pictures are smaller than what is trained on" in note for note in made[1].notes)


def test_guidance_can_lead_away_from_zeros(config, made):
    """As SDXL's usual script has it; captions that are dropped stay the embedding of the empty prompt."""
    cache = prepare(replace(config, null_prompt="zeros"), "emoji", made[0], "cpu")
    (bucket,) = cache.buckets
    batch = cache.read([Pick(bucket, 1, True)])
    assert not batch.null_conditioning["encoder_hidden_states"].any()
    usual = made[1].read([Pick(bucket, 1, True)]).null_conditioning["encoder_hidden_states"]
    torch.testing.assert_close(batch.conditioning["encoder_hidden_states"], usual, rtol=0, atol=0)
    with pytest.raises(InputError, match="unknown null_prompt 'nothing'"):
        DataConfig(path="x", null_prompt="nothing").check()
