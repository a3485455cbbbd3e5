"""What of a cache is made again, by what change or damage, and what a second run leaves alone."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.embedded import embedded_vae
from tests.trainer.cache.conftest import EMOJI, contents, rows
from trainer.data.cache import prepare
from trainer.data.settings import DataConfig


def test_a_second_run_computes_and_writes_nothing(config, made, no_networks):
    before = {p: p.stat().st_mtime_ns for p in made[0].rglob("*")}
    again = prepare(config, "emoji", made[0], "cpu")
    assert {p: p.stat().st_mtime_ns for p in made[0].rglob("*")} == before
    assert again.skipped == made[1].skipped


@pytest.mark.parametrize(
    ("change", "new_latents", "new_text"),
    [
        ({"flip": True}, True, False),
        ({"resolution": 128}, True, False),
        ({"shard_size": 2}, True, True),
        ({"caption_dropout": 0.5, "cache_batch": 4}, False, False),
    ],
)
def test_other_settings_are_other_folders(config, copied, change, new_latents, new_text):
    before = contents(copied)
    prepare(replace(config, **change), "emoji", copied, "cpu")
    after = contents(copied)
    assert {name: after[name] for name in before} == before
    kinds = {name.partition("-")[0] for name in after.keys() - before.keys()}
    assert kinds == {kind for kind, new in (("latents", new_latents), ("text", new_text)) if new}


def test_another_vae_makes_new_latents_and_never_mixes(config, copied, tmp_path):
    """Half of the old cache is missing, so that the wrong key would fill it up from the new VAE."""
    teacher = tmp_path / "teacher"
    for part, name in (("unet_teacher", "unet"), ("text_encoder",) * 2, ("tokenizer",) * 2):
        shutil.copytree(EMOJI / part, teacher / name)
    other = embedded_vae()
    with torch.no_grad():
        other.encoder.conv_in.bias += 0.01
    other.save_pretrained(teacher / "vae")
    (old,) = copied.glob("latents-*")
    (old / "000001.safetensors").unlink()
    cache = prepare(replace(config, resolution=64), teacher, copied, "cpu")
    assert len(list(copied.glob("latents-*"))) == 2
    assert len(list(copied.glob("text-*"))) == 1  # the same text encoder: nothing to do again
    assert not (old / "000001.safetensors").exists()
    assert len(cache) == 6


def test_a_changed_picture_or_caption_is_noticed(photos, config, copied, tmp_path):
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    config = replace(config, path=str(data))
    prepare(config, "emoji", copied, "cpu")
    assert len(list(copied.iterdir())) == 3  # copied to another place, the same pictures are known again
    (data / "1.txt").write_text("another caption")
    prepare(config, "emoji", copied, "cpu")
    assert [len(list(copied.glob(f"{kind}-*"))) for kind in ("latents", "text")] == [1, 2]
    shutil.copy(data / "2.jpg", data / "3.jpg")
    prepare(config, "emoji", copied, "cpu")
    assert [len(list(copied.glob(f"{kind}-*"))) for kind in ("latents", "text")] == [2, 2]


@pytest.mark.parametrize("damage", ["gone", "short", "garbage"])
def test_a_damaged_shard_is_made_again_as_it_was(config, copied, damage):
    before = contents(copied)
    shard = copied / min(before)
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-10] if damage == "short" else b"garbage")
    prepare(config, "emoji", copied, "cpu")
    assert contents(copied) == before


def test_another_way_of_painting_is_another_folder(tmp_path, teachers):
    teacher = teachers("v_prediction", True)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    config = DataConfig(prompts=str(tmp_path / "prompts.txt"), teacher_steps=1)
    latents = []
    for change in ({}, {"teacher_guidance": 2.0}, {"teacher_seed": 1}):
        latents.append(rows(prepare(replace(config, **change), teacher, tmp_path / "cache", "cpu")).latents)
    assert [len(list((tmp_path / "cache").glob(f"{kind}-*"))) for kind in ("latents", "text")] == [3, 1]
    assert not torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2])


@pytest.mark.parametrize("kind", ["latents", "text"])
@pytest.mark.parametrize("place", [8, -500, -3])
def test_a_shard_with_one_flipped_bit_is_named_and_made_again(config, made, copied, kind, place):
    """In its header or among its numbers: it must not be trained on, nor end in a traceback."""
    shard = next(copied.glob(f"{kind}-*/000000.safetensors"))
    content = bytearray(shard.read_bytes())
    content[place] ^= 16
    shard.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"{kind}-.*000000.safetensors.*; it is made again"):
        prepare(config, "emoji", copied, "cpu")
    assert contents(copied) == contents(made[0])


def test_a_list_of_skipped_pictures_that_is_no_text_is_written_again(config, copied):
    file = next(copied.glob("latents-*/skipped.json"))
    before = file.read_bytes()
    file.write_bytes(b"\xff\xfe nothing")
    prepare(config, "emoji", copied, "cpu")
    assert file.read_bytes() == before


def test_the_reason_for_skipping_a_picture_is_the_same_in_every_process(tmp_path):
    """Else `eval` takes the same pictures for others."""
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "broken.webp").write_bytes(b"RIFF1234WEBP")
    skipped = prepare(DataConfig(path=str(tmp_path)), "emoji", tmp_path / "cache", "cpu").skipped
    assert [name for name, _ in skipped] == ["broken.webp", "empty.jpg"]
    assert not any(" at 0x" in reason or "object" in reason for _, reason in skipped)
