"""The cache of latents and text: right numbers, nothing mixed, nothing half-written, the same whoever makes it."""

import json
import os
import resource
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps

from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from lcm_core.pipeline import Pipeline
from lcm_core.pipeline.image import to_pil
from lcm_core.pipeline.model import load_model
from lcm_core.pipeline.sources import MODELS
from trainer.cli.main import main
from trainer.data.cache import Pick, prepare
from trainer.data.encode import text_maker
from trainer.data.settings import DataConfig
from trainer.data.sources import read_prompts
from trainer.data.teacher import Teacher
from trainer.distributed import Processes
from trainer.recipes.emoji.data import LATENT_STEPS, Drawing, load_shipped, save_shipped

EMOJI = MODELS / "emoji"
SIZES = [(96, 64), (64, 96), (80, 80), (200, 64), (40, 40), (64, 64)]


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Six pictures, five captions, and one JPEG that was cut short."""
    root = tmp_path_factory.mktemp("photos")
    numbers = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        noise = numbers.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(root / f"{i}.jpg")
        if i:
            (root / f"{i}.txt").write_text(f"picture number {i}")
    (root / "5.txt").write_text("picture number 4")  # two pictures share a caption
    broken = (root / "1.jpg").read_bytes()
    (root / "broken.jpg").write_bytes(broken[: len(broken) // 2])
    return root


@pytest.fixture(scope="session")
def config(photos):
    return DataConfig(path=str(photos), shard_size=3, cache_batch=2)


@pytest.fixture(scope="session")
def made(config, tmp_path_factory):
    """A finished cache of the pictures, by the embedded model; not to be changed."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, prepare(config, "emoji", folder, "cpu")


@pytest.fixture
def copied(made, tmp_path):
    """A copy of that cache, which a test may spoil."""
    return Path(shutil.copytree(made[0], tmp_path / "copied"))


@pytest.fixture
def no_networks(monkeypatch):
    """Fails a test in which anything is computed anew."""

    def refuse(*_):
        pytest.fail("a network was loaded")

    monkeypatch.setattr("trainer.data.cache.Images.load", refuse)
    monkeypatch.setattr("trainer.data.cache.text_maker", refuse)


def contents(folder):
    """All bytes of all shards, but for the order of their metadata, which the format does not fix."""
    return {str(path.relative_to(folder)): parse(path) for path in sorted(folder.rglob("*.safetensors"))}


def parse(shard):
    """Header and data."""
    content = shard.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def rows(cache):
    """All that a cache with one bucket holds, in its order."""
    (bucket,) = cache.buckets
    return cache.read([Pick(bucket, row, False) for row in range(len(cache))])


def to_tensor(picture):
    return torch.tensor(np.array(picture)).float()


def reference_latents(path):
    """diffusers' own encoder on Pillow's own cover-and-crop."""
    vae = AutoencoderKL.from_pretrained(EMOJI / "vae").eval()
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


def test_a_second_run_computes_and_writes_nothing(config, made, no_networks):
    before = {p: p.stat().st_mtime_ns for p in made[0].rglob("*")}
    again = prepare(config, "emoji", made[0], "cpu")
    assert {p: p.stat().st_mtime_ns for p in made[0].rglob("*")} == before
    assert again.skipped == made[1].skipped


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
    for part, name in (("unet_teacher", "unet"), ("vae", "vae"), ("text_encoder",) * 2, ("tokenizer",) * 2):
        shutil.copytree(EMOJI / part, teacher / name)
    other = AutoencoderKL.from_pretrained(teacher / "vae")
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


def test_two_processes_write_what_one_writes(config, made, tmp_path):
    """Each makes its own shards; one that finds those of the other missing says so."""
    with pytest.raises(InputError, match="another process made it"):
        prepare(config, "emoji", tmp_path, processes=Processes(rank=1, size=2))
    mine = contents(tmp_path)
    assert {Path(name).name for name in mine} == {"000001.safetensors"}
    prepare(config, "emoji", tmp_path, processes=Processes(rank=0, size=2))
    assert contents(tmp_path) == contents(made[0])


@pytest.mark.parametrize("kind", ["emoji", "v_prediction"])
def test_prompts_alone_are_painted_as_the_pipeline_paints_them(tmp_path, teachers, kind):
    """Same seed, solver and guidance; the pipeline ends in pixels, so the latents are decoded first."""
    teacher = "emoji" if kind == "emoji" else teachers("v_prediction", True)  # with zero terminal SNR
    (tmp_path / "prompts.txt").write_text("a red apple, noto style\na cat\n")
    config = DataConfig(
        prompts=str(tmp_path / "prompts.txt"), variants=2, teacher_steps=3, teacher_guidance=3.0, teacher_seed=7
    )
    cache = prepare(config, teacher, tmp_path / "cache", "cpu")
    assert cache.captions == ["", "a red apple, noto style", "a cat"]
    pipe = Pipeline.load(teacher, "cpu", unet="teacher" if kind == "emoji" else None)
    options = {"num_inference_steps": 3, "guidance_scale": 3.0, "sampler": "dpmpp_2m", "seed": [7, 8, 9, 10]}
    words = ["a red apple, noto style"] * 2 + ["a cat"] * 2
    expected = pipe(words, **options).images
    painted = [to_pil(pipe.model.vae.decode(latents[None]))[0] for latents in rows(cache).latents]
    for ours, theirs in zip(painted, expected, strict=True):  # in a batch of 4, networks round differently
        torch.testing.assert_close(to_tensor(ours), to_tensor(theirs), rtol=0, atol=1)
    states = pipe.model.encode(words, 64, 64)["encoder_hidden_states"].half().float()
    torch.testing.assert_close(rows(cache).conditioning["encoder_hidden_states"], states, rtol=0, atol=0)


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


def test_the_shipped_drawings_need_no_vae(tmp_path, monkeypatch):
    latents, drawing = torch.randint(-99, 99, (3, 4, 8, 8)) / LATENT_STEPS, ("1f355", "pizza", (), "food", "noto")
    entries = [Drawing(*drawing, held_out=i == 1) for i in range(4)]
    save_shipped(tmp_path, entries, latents, {"features": torch.zeros(4, 2)})
    monkeypatch.setattr("trainer.recipes.emoji.data.load_shipped", lambda: load_shipped(tmp_path))
    cache = prepare(DataConfig(path="emoji"), "emoji", tmp_path / "cache", "cpu")
    torch.testing.assert_close(rows(cache).latents, latents, rtol=0, atol=0)
    assert cache.captions == ["", "pizza, noto style"]


def test_missing_kornia_is_told_before_the_work_not_of_every_picture(config, tmp_path, monkeypatch, no_networks):
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(InputError, match="colour augmentation needs kornia"):
        prepare(replace(config, colour=0.1), "emoji", tmp_path, "cpu")


def test_long_captions_are_told_once(tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"{i} {'very ' * 100}long\n" for i in range(3)))
    maker = text_maker(read_prompts(tmp_path / "prompts.txt"), Teacher("emoji"), torch.device("cpu"))
    with pytest.warns(UserWarning, match="too long and lose their ends"):
        maker(range(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maker(range(1, 3))


def test_data_without_one_good_picture_is_refused(tmp_path, photos):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(photos / "broken.jpg", data)
    with pytest.raises(InputError, match=r"none of 1 pictures can be used \(first: broken\.jpg"):
        prepare(DataConfig(path=str(data)), "emoji", tmp_path / "cache", "cpu")


def test_a_full_disk_is_named_and_loses_nothing(config, made, tmp_path):
    """A limit on the size of files fails the write of the text, of 77 x 128 halves each, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*text-.*000000.safetensors.*free some space"):
            prepare(config, "emoji", tmp_path, "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = {name: data for name, data in contents(made[0]).items() if name.startswith("latents")}
    assert contents(tmp_path) == kept
    assert not list(tmp_path.glob("*/.*"))


def test_a_folder_that_cannot_be_written_is_named_before_the_work(config, tmp_path, no_networks):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*file.*choose another output path"):
        prepare(config, "emoji", tmp_path / "file" / "cache", "cpu")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named_or_read_if_it_is_complete(config, copied, tmp_path):
    for path in [copied, *copied.iterdir()]:
        path.chmod(0o555)
    try:
        assert len(prepare(config, "emoji", copied, "cpu")) == 6
        with pytest.raises(InputError, match="Permission denied"):
            prepare(replace(config, flip=True), "emoji", copied, "cpu")
    finally:
        for path in [copied, *copied.iterdir()]:
            path.chmod(0o755)


def command(*options):
    return main(["cache", "--device", "cpu", "--cache-batch", "2", "--shard-size", "3", *map(str, options)])


def test_the_command_fills_the_cache_that_distill_reads(photos, made, tmp_path, capsys):
    assert command("--teacher", "emoji", "--data", photos, "--output", tmp_path / "out") == 0
    assert contents(tmp_path / "out" / "cache") == contents(made[0])
    shown = capsys.readouterr()
    assert "6 pictures of 1 size, 4 captions, 1 skipped" in shown.out
    assert "broken.jpg" in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "x", "--output", "y"], "no teacher was given"),
        (["--teacher", "emoji", "--data", "x"], "no folder was given"),
        (["--teacher", "emoji", "--output", "y"], "neither data nor prompts"),
        (["--teacher", "emoji", "--data", "gone", "--output", "y"], "data gone does not exist"),
        (["--teacher", "gone", "--data", ".", "--output", "y"], "unknown model 'gone'"),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_two_real_processes_share_the_work(photos, made, tmp_path):
    """Started as `accelerate launch` starts them, over gloo."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--teacher", "emoji", "--data", photos, "--cache", tmp_path, "--device", "cpu"]
    done = subprocess.run(
        [*launch, "-m", "trainer", "cache", "--cache-batch", "2", "--shard-size", "3", *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(made[0])


def test_shards_are_mapped_not_read(made):
    """Memory must not grow with the data."""
    shard = next(made[0].glob("text-*/*.safetensors"))
    tensor = read_safetensors(shard)[0]["encoder_hidden_states"]
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(shard) in maps.read_text()
    assert tensor.dtype == torch.float16


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
