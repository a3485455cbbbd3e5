"""A ControlNet or T2I-Adapter in a distillation: teacher and student are asked with it alike, as diffusers asks."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks.control import load_control
from lcm_core.networks.unet import UNet
from tests.core.references import diffusers_pipeline
from tests.core.test_ip_adapter import make_adapter, make_encoder
from tests.trainer.conftest import WIDTH, build_unet
from trainer.cli.main import main
from trainer.config import DistillConfig, StudentConfig
from trainer.control import AttendingUNet, ControlledUNet, control_size
from trainer.data.augment import make_variant
from trainer.data.buckets import make_buckets
from trainer.data.cache import Pick, prepare
from trainer.data.items import decode
from trainer.data.settings import DataConfig
from trainer.data.teacher import Teacher
from trainer.disk import cache_size
from trainer.methods.shared import Sample
from trainer.students import lora_student, to_network

QUICK = ["--batch-size", "2", "--rank", "2", "--preview-every", "0", "--no-tensorboard", "--device", "cpu"]
QUICK += ["--samples", "0", "--warmup-steps", "1", "--resolution", "64", "--steps", "1"]
WIDTHS = (32, 32, 32, 32)


def make_controlnet():
    from diffusers import ControlNetModel

    torch.manual_seed(1)
    network = ControlNetModel(
        block_out_channels=WIDTHS,
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        conditioning_embedding_out_channels=(8, 8, 8, 8),
    )
    for name, parameter in network.named_parameters():  # the layers that lead out begin with zeros
        if "controlnet_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


def make_t2i(channels, widths=WIDTHS):
    from diffusers import T2IAdapter

    torch.manual_seed(2)
    return T2IAdapter(channels, list(widths), num_res_blocks=1, adapter_type="full_adapter").eval()


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control") / "net"
    make_controlnet().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An IP-Adapter with its image encoder beside it."""
    folder = tmp_path_factory.mktemp("ip")
    make_encoder(folder / "image_encoder")
    return make_adapter(folder / "ip.safetensors", build_unet())


@pytest.fixture(scope="module")
def hints(tmp_path_factory):
    """Control pictures for the six photos, in another format and size."""
    folder = tmp_path_factory.mktemp("hints")
    for number in range(6):
        Image.effect_noise((80, 80), 90).convert("RGB").save(folder / f"{number}.webp", lossless=True)
    return folder


def picks(bucket, count):
    """The first rows of a cache."""
    return [Pick(bucket, row, False) for row in range(count)]


@pytest.mark.parametrize("role", ["online", "teacher", "critic", "target"])
def test_each_part_is_asked_as_diffusers_asks(controlnet, role):
    """The teacher with both halves of its guidance, which the control sees with their own text."""
    control, unet, plain = make_controlnet(), build_unet(), build_unet()
    call = UNet(unet)
    asked = ControlledUNet(call, load_control(controlnet, call, "teacher"), 0.7)
    student = lora_student(unet, to_network(asked), StudentConfig(rank=2), with_critic=True)
    x, hint, text = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64), torch.randn(2, 7, WIDTH)
    t, null, w = torch.tensor([19, 779]), torch.randn(2, 7, WIDTH), torch.tensor([1.5, 3.0])
    parts = {"x0": x, "eps": x, "points": None, "w": w}
    words = ({"encoder_hidden_states": states, "hint": hint} for states in (text, null))
    networks = student.networks.given(Sample(**parts, conditioning=next(words), null_conditioning=next(words)))

    def theirs(states):
        down, middle = control(x, t, states, hint, conditioning_scale=0.7, return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return plain(x, t, states, **added).sample

    with torch.no_grad():
        expected = theirs(text)
        assert float((expected - plain(x, t, text).sample).abs().max()) > 1e-2
        if role == "teacher":
            expected = expected + w.view(2, 1, 1, 1) * (expected - theirs(null))
        assert_close(getattr(networks, role)(x, t), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_adapter_sees_the_picture_in_grey_or_in_colour(tmp_path, channels):
    network, unet = make_t2i(channels), build_unet()
    network.save_pretrained(tmp_path)
    x, hint, text, t = (
        torch.randn(2, 4, 8, 8),
        torch.rand(2, 3, 64, 64),
        torch.randn(2, 7, WIDTH),
        torch.tensor([9, 99]),
    )
    call = UNet(unet)
    asked = ControlledUNet(call, load_control(tmp_path, call, "teacher"), 0.7)
    seen = hint if channels == 3 else (0.299 * hint[:, 0] + 0.587 * hint[:, 1] + 0.114 * hint[:, 2]).unsqueeze(1)
    with torch.no_grad():
        features = [0.7 * feature for feature in network(seen)]
        expected = unet(x, t, text, down_intrablock_additional_residuals=features).sample
        assert_close(asked(x, t, encoder_hidden_states=text, hint=hint), expected, rtol=0, atol=1e-5)


def test_a_control_picture_is_cropped_and_mirrored_like_its_picture(photos, tmp_path):
    """Each picture is its own control picture, twice as large: then what is seen is the picture in the cache."""
    data, doubled = tmp_path / "data", tmp_path / "doubled"
    (data / "inner").mkdir(parents=True)
    (doubled / "inner").mkdir(parents=True)
    for number, size in enumerate([(192, 128), (90, 140), (128, 128)]):
        name = f"inner/{number}" if number else f"{number}"
        picture = Image.effect_noise((6, 6), 90).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        picture.save(data / f"{name}.png")
        picture.resize((2 * size[0], 2 * size[1]), Image.Resampling.BICUBIC).save(doubled / f"{name}.bmp")
    config = DataConfig(
        path=str(data), control_pictures=str(doubled), resolution=128, flip=True, crop=0.5, variants=4, shard_size=8
    )
    cache = prepare(config, "emoji", tmp_path / "cache", "cpu")
    buckets, found = make_buckets(128, 64), []
    for name in ("0.png", "inner/1.png", "inner/2.png"):
        picture = decode((data / name).read_bytes(), name)
        found += [make_variant(picture, name, number, buckets, config)[0] for number in range(4)]
    seen = [hint for bucket in cache.buckets.items() for hint in cache.read(picks(*bucket)).conditioning["hint"]]
    assert len(seen) == len(found) == 12
    for hint in seen:
        alike = [image for image in found if image.shape[1:] == hint.shape]
        assert min(float((image[0] / 2 + 0.5 - hint).abs().mean()) for image in alike) < 0.02


def test_rows_with_control_pictures_are_taken_over_by_such_alone(photos, hints, tmp_path, monkeypatch):
    """Another control picture makes its own row again; a cache without them takes none of those rows."""
    from trainer.data import encode

    decoded, variants = [], encode.Images._variants
    monkeypatch.setattr(
        encode.Images, "_variants", lambda self, n: decoded.append(self.source.items[n].key) or variants(self, n)
    )
    folder = shutil.copytree(hints, tmp_path / "hints")
    config = DataConfig(path=str(photos), control_pictures=str(folder), resolution=64)
    first = prepare(config, "emoji", tmp_path / "cache", "cpu")
    assert sorted(decoded) == [f"{number}.png" for number in range(6)]
    decoded.clear()
    Image.new("RGB", (8, 8), "white").save(folder / "3.webp", lossless=True)
    again = prepare(config, "emoji", tmp_path / "cache", "cpu")
    assert decoded == ["3.png"]
    ((bucket, _),) = again.buckets.items()
    rows = [cache.read(picks(bucket, 6)).conditioning["hint"] for cache in (first, again)]
    changed = [row for row in range(6) if not torch.equal(rows[0][row], rows[1][row])]
    assert changed == [3]
    assert_close(rows[1][3], torch.ones(3, 64, 64))
    decoded.clear()
    plain = prepare(DataConfig(path=str(photos), resolution=64), "emoji", tmp_path / "cache", "cpu")
    assert len(decoded) == 6
    assert "hint" not in plain.read(picks(bucket, 2)).conditioning


def test_a_picture_without_a_control_picture_is_left_out_by_name(photos, hints, tmp_path):
    folder = shutil.copytree(hints, tmp_path / "hints")
    (folder / "2.webp").unlink()
    config = DataConfig(path=str(photos), control_pictures=str(folder), resolution=64)
    cache = prepare(config, "emoji", tmp_path / "cache", "cpu")
    assert len(cache) == 5
    ((name, reason),) = cache.skipped
    assert (name, "no control picture 2.png" in reason) == ("2.png", True)


def test_an_ip_adapter_sees_each_picture_as_diffusers_does(teachers, photos, adapter, tmp_path):
    """Teacher with both halves of its guidance, of which one sees nothing; the student sees the picture. The cache
    rounds what is seen to float16."""
    from transformers import CLIPImageProcessor

    cache = prepare(
        DataConfig(path=str(photos), resolution=64), Teacher(teachers(), control=str(adapter)), tmp_path, "cpu"
    )
    ((bucket, _),) = cache.buckets.items()
    batch = cache.read(picks(bucket, 2))
    unet = build_unet()
    call = UNet(unet)
    asked = AttendingUNet(call, load_control(adapter, call, teachers()), 0.7)
    student = lora_student(unet, to_network(asked), StudentConfig(rank=2))
    x, t, w = torch.randn(2, 4, 8, 8), torch.tensor([19, 779]), torch.tensor([1.5, 3.0])
    parts = {"x0": x, "eps": x, "points": None, "w": w}
    sample = Sample(**parts, conditioning=batch.conditioning, null_conditioning=batch.null_conditioning)
    networks = student.networks.given(sample)

    processor = CLIPImageProcessor(size=32, crop_size=32)
    pipe = diffusers_pipeline("StableDiffusionPipeline", teachers(), feature_extractor=processor)
    pipe.load_ip_adapter(adapter.parent, "", adapter.name, "image_encoder", local_files_only=True)
    pipe.set_ip_adapter_scale(0.7)
    seen = [
        pipe.prepare_ip_adapter_image_embeds([Image.open(photos / f"{number}.png")], None, "cpu", 1, True)[0]
        for number in range(2)
    ]

    def theirs(states, half):
        added = {"image_embeds": [torch.stack([embeds[half] for embeds in seen])]}
        return pipe.unet(x, t, states["encoder_hidden_states"], added_cond_kwargs=added).sample

    with torch.no_grad():
        positive, negative = theirs(batch.conditioning, 1), theirs(batch.null_conditioning, 0)
        plain = build_unet()(x, t, batch.conditioning["encoder_hidden_states"]).sample
        assert float((positive - plain).abs().max()) > 2e-2
        assert_close(networks.online(x, t), positive, rtol=0, atol=1e-3)
        guided = positive + w.view(2, 1, 1, 1) * (positive - negative)
        assert_close(networks.teacher(x, t), guided, rtol=0, atol=5e-3)


def test_a_lora_is_learnt_in_layers_that_attend_to_pictures(teachers, photos, adapter, tmp_path):
    words = ["distill", "--teacher", teachers(), "--data", photos, "--output", tmp_path / "out", *QUICK]
    assert main([*map(str, words), "--control", str(adapter)]) == 0
    tensors = read_safetensors(tmp_path / "out" / "out_lora.safetensors")[0]
    for layer in ("q", "k", "v", "out_0"):
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_{layer}.lora_up.weight"
        assert bool(tensors[name].any()), name


@pytest.mark.parametrize("student", ["lora", "full"])
def test_a_run_learns_under_its_control(teachers, photos, hints, controlnet, tmp_path, student):
    """Its loss is another than without."""
    losses = []
    kind = [
        "--student",
        student,
        "--w-min",
        "1",
        "--w-max",
        "1",
        "--guidance-embedding-dim",
        "16",
        "--learning-rate",
        "1e-3",
    ]
    for given in (["--control", f"{controlnet}:0.5", "--control-pictures", hints], []):
        words = ["distill", "--teacher", teachers(), "--data", photos, "--output", tmp_path / str(len(given)), *QUICK]
        assert main([*map(str, words), *map(str, [*kind, *given])]) == 0
        lines = (tmp_path / str(len(given)) / "run" / "log.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[-1])["loss"])
    assert abs(losses[0] - losses[1]) > 1e-4 * losses[1]


def test_another_control_under_the_same_name_does_not_go_on_with_a_run(
    teachers, photos, hints, controlnet, tmp_path, capsys
):
    control = shutil.copytree(controlnet, tmp_path / "net")
    words = ["distill", "--teacher", teachers(), "--data", photos, "--output", tmp_path / "out", *QUICK]
    words += ["--control", control, "--control-pictures", hints]
    assert main([*map(str, words)]) == 0
    network = make_controlnet()
    torch.nn.init.zeros_(network.conv_in.weight)
    network.save_pretrained(control)
    assert main([*map(str, words), "--steps", "2"]) == 2
    assert f"control {control} has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--control", "{net}"], "has nothing to look at"),
        (["--control-pictures", "{hints}"], "but no control"),
        (["--control", "nothing", "--control-pictures", "{hints}"], "does not exist"),
        (["--control", "{net}", "--control-pictures", "nothing"], "is no folder"),
        (["--control", "{wide}", "--control-pictures", "{hints}"], "is for a U-Net of widths"),
        (["--control", "{ip}", "--gradient-checkpointing"], "leave gradient_checkpointing out"),
    ],
)
def test_what_cannot_guide_is_refused_in_a_line(
    teachers, photos, hints, controlnet, adapter, tmp_path, capsys, given, message
):
    make_t2i(3, (32, 32, 64, 64)).save_pretrained(tmp_path / "wide")
    places = {"net": controlnet, "hints": hints, "wide": tmp_path / "wide", "ip": adapter}
    words = ["distill", "--teacher", teachers(), "--data", photos, "--output", tmp_path / "out", *QUICK]
    assert main([*map(str, words), *(word.format(**places) for word in given)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_finished_cache_has_its_control_pictures(teachers, photos, hints, controlnet, tmp_path, capsys):
    """It can be trained from under the control, and not without."""
    cached = ["cache", "--teacher", teachers(), "--data", photos, "--cache", tmp_path / "cache", "--resolution", "64"]
    assert main([*map(str, cached), "--control-pictures", str(hints)]) == 0
    words = ["distill", "--teacher", teachers(), "--data", tmp_path / "cache", "--output", tmp_path / "out", *QUICK]
    assert main([*map(str, words)]) == 2
    assert "was made for a ControlNet or T2I-Adapter; give --control" in capsys.readouterr().err
    assert main([*map(str, words), "--control", str(controlnet)]) == 0


def test_the_plan_counts_the_control(teachers, controlnet):
    config, teacher = DistillConfig(control=f"{controlnet}:0.5"), Teacher(teachers())
    assert control_size(config, teacher.source) == sum(p.numel() for p in make_controlnet().parameters())
    assert control_size(DistillConfig(), teacher.source) == 0
    assert cache_size(teacher, 5, 2, 8, has_hints=True) - cache_size(teacher, 5, 2, 8) == 5 * 3 * 64 * 64
