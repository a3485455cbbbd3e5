"""The emoji recipe from icon packages to a finished model, on icons drawn here, with a handful of steps."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from lcm_core.diffusion.guidance import guidance_embedding
from lcm_core.files.checkpoint import read_component
from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks.lora_layers import add_lora, lora_state_dict
from lcm_core.networks.unet import load_unet
from trainer.cli.main import main
from trainer.recipes.emoji import autoencoder, publish, stages, teacher
from trainer.recipes.emoji.autoencoder import SCALING_FACTOR, build_vae, normalise_latents
from trainer.recipes.emoji.data import CORE, REDRAWN, STYLE_HELD_OUT, is_held_out
from trainer.recipes.emoji.icons import NAME_LISTS, NAMES_PACKAGE, SETS, load_drawings
from trainer.recipes.emoji.student import average, merged
from trainer.recipes.emoji.words import CONTEXT_WIDTH, build_tokenizer, tokenize

COLOURS = ["red", "green", "blue", "black", "orange", "purple"]


@pytest.fixture(scope="module")
def icons(tmp_path_factory):
    """`node_modules` in the shape of the real packages: 24 coloured shapes in every style."""
    root = tmp_path_factory.mktemp("icons")
    names = [f"{colour} {shape}" for colour in COLOURS for shape in ("disc", "square", "bar", "ring")]
    codes = [f"1F4{i:02X}" for i in range(len(names))]
    emoji = [
        {"label": name, "hexcode": code, "tags": ["shape"], "order": i, "group": 4}
        for i, (name, code) in enumerate(zip(names, codes, strict=True))
    ]
    emoji.append({"label": "flag: nowhere", "hexcode": "1F1E6", "tags": [], "order": 99, "group": 9})
    _write(root / NAMES_PACKAGE.rsplit("@", 1)[0] / "en/data.json", emoji)
    for name in NAME_LISTS:
        _write(root / NAMES_PACKAGE.rsplit("@", 1)[0] / f"en/shortcodes/{name}.json", {})
    for style, icon_set in SETS.items():
        folder = root / icon_set.folder
        icons = {name.replace(" ", "-"): {"body": _shape(*name.split())} for name in names}
        _write(folder / "icons.json", {"icons": icons, "width": 32, "height": 32})
        chars = {code.lower(): name.replace(" ", "-") for code, name in zip(codes, names, strict=True)}
        # as published: the sets that are redrawn, and others, do not list their code points
        by_name = style not in (*CORE, STYLE_HELD_OUT)
        _write(folder / "chars.json", {} if by_name else {**chars, "1f1e6": names[0].replace(" ", "-")})
    return root


def _write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _shape(colour: str, shape: str) -> str:
    return {
        "disc": f'<circle cx="16" cy="16" r="12" fill="{colour}"/>',
        "square": f'<rect x="6" y="6" width="20" height="20" fill="{colour}"/>',
        "bar": f'<rect x="2" y="12" width="28" height="8" fill="{colour}"/>',
        "ring": f'<circle cx="16" cy="16" r="10" fill="none" stroke="{colour}" stroke-width="5"/>',
    }[shape]


@pytest.fixture(scope="module")
def drawings(icons, tmp_path_factory):
    return load_drawings(tmp_path_factory.mktemp("data"), 64, icons)


def test_drawings_are_rendered_on_white_without_flags(drawings):
    assert drawings.images.shape == (9 * 24, 4, 64, 64)
    assert not any("flag" in e.label for e in drawings.entries)
    first = next(i for i, e in enumerate(drawings.entries) if e.label == "red disc")
    picture = drawings.on_white(torch.tensor([first]))[0]
    torch.testing.assert_close(picture[:, 32, 32], torch.tensor([255, 0, 0], dtype=torch.uint8))
    torch.testing.assert_close(picture[:, 0, 0], torch.tensor([255, 255, 255], dtype=torch.uint8))


def test_a_held_out_emoji_is_seen_in_other_styles_but_in_none_that_redraws_its_own(drawings):
    held_out = [e for e in drawings.entries if e.held_out and e.style != STYLE_HELD_OUT]
    assert {e.style for e in held_out} >= {*CORE, *REDRAWN}
    for entry in held_out:
        root = REDRAWN.get(entry.style, entry.style)
        for other in (e for e in drawings.entries if e.code == entry.code and e.style != STYLE_HELD_OUT):
            assert other.held_out == (REDRAWN.get(other.style, other.style) == root)
        assert is_held_out(entry.code, entry.style)
        assert is_held_out(f"{entry.code}-1f3fd", entry.style)  # in every tone of skin


def test_one_style_is_never_trained_on(drawings):
    assert all(e.held_out for e in drawings.entries if e.style == STYLE_HELD_OUT)


def test_any_prompt_has_tokens_and_known_words_have_one_each(drawings, tmp_path):
    tokenizer = build_tokenizer(drawings, tmp_path)
    tokens = tokenize(tokenizer, ["red disc, noto style", "Zürich 東京 🍕"])
    assert tokens.shape == (2, 77)
    words = tokenizer.convert_ids_to_tokens(tokens[0].tolist())
    assert (
        words[:8]
        == ["<|startoftext|>", "red</w>", "disc</w>", ",</w>", "noto</w>", "style</w>"] + ["<|endoftext|>"] * 2
    )
    assert (tokens[1] != tokenizer.eos_token_id).sum() > 10  # bytes, not a single unknown token


def test_normalised_latents_have_mean_0_and_spread_1_and_the_same_pictures(drawings):
    torch.manual_seed(0)
    vae = build_vae().eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        spread = vae.encode(pixels).latent_dist.std / vae.encode(pixels).latent_dist.mean.std((0, 2, 3), keepdim=True)
        images = drawings.on_white(torch.arange(len(drawings.entries)))
        normalise_latents(vae, images, torch.device("cpu"))
        after = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        latents = vae.encode(images.float() / 127.5 - 1).latent_dist.mean * SCALING_FACTOR
        spread_after = vae.encode(pixels).latent_dist.std / vae.encode(pixels).latent_dist.mean.std(
            (0, 2, 3), keepdim=True
        )
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(spread_after, spread, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-2)


def test_the_recipe_makes_a_model_that_the_library_paints_with(icons, tmp_path, capsys, monkeypatch):
    small = {name: replace(config, batch_size=2) for name, config in stages.STAGES.items()}
    narrow = partial(teacher.build_unet, block_out_channels=(32,) * 4, layers_per_block=1, norm_num_groups=8)
    monkeypatch.setattr(teacher, "build_unet", narrow)
    monkeypatch.setattr(autoencoder, "WIDTHS", (32, 32, 32, 32))
    monkeypatch.setattr(stages, "STAGES", small)
    monkeypatch.setattr(publish, "TEACHER_GUIDANCE", (2.0,))
    monkeypatch.setattr(publish, "STUDENT_GUIDANCE", (1.0,))
    arguments = ["recipe", "emoji", "--work", str(tmp_path / "work"), "--icons", str(icons)]
    arguments += [
        "--effort",
        "0.00005",
        "--samples",
        "8",
        "--size",
        "64",
        "--batch-scale",
        "2",
        "--workers",
        "2",
        "--output",
        str(tmp_path / "model"),
    ]
    assert main(arguments) == 0
    assert "|LCM|lcm|4|" in capsys.readouterr().out.replace(" ", "")
    assert "held-out" in (tmp_path / "model/README.md").read_text()
    lora = read_safetensors(tmp_path / "model/lora/lcm_lora.safetensors")[0]
    assert any(key.startswith("lora_unet_down_blocks_0") and key.endswith(".alpha") for key in lora)
    style = read_safetensors(tmp_path / "model/lora/ink_style.safetensors")[0]
    assert style.keys() == lora.keys()
    assert [file.name for file in (tmp_path / "model/unet_lcm").glob("*.safetensors")] == [
        "diffusion_pytorch_model.int8.safetensors"
    ]
    student = read_component(tmp_path / "model/unet_lcm", "unet").tensors
    assert student["time_embedding.cond_proj.weight"].dtype == torch.float16
    both = [read_safetensors(tmp_path / f"work/{stage}-64/result.safetensors")[0] for stage in ("lora", "lora_dmd2")]
    mean = {key: (both[0][key].double() + both[1][key].double()) / 2 for key in lora}
    torch.testing.assert_close({key: lora[key].double() for key in lora}, mean, rtol=2e-3, atol=1e-6)
    guidance = [
        read_component(tmp_path / f"work/{stage}-64/result/unet", "unet").tensors["time_embedding.cond_proj.weight"]
        for stage in ("lcm", "lcm_dmd2")
    ]  # half of the result is the LCM-LoRA's, which does not read it
    torch.testing.assert_close(
        student["time_embedding.cond_proj.weight"].double(), sum(guidance).double() / 4, rtol=2e-3, atol=1e-6
    )
    configs = [file.read_text() for file in (tmp_path / "model").glob("*/config.json")]
    assert len(configs) == 5
    assert not any(str(tmp_path) in text for text in configs)  # nobody's folders in a published model
    command = [sys.executable, "-m", "lcm_core", "generate", "red disc", "--model", str(tmp_path / "model")]
    subprocess.run([*command, "--steps", "1", "--output", str(tmp_path / "disc.png")], check=True)
    assert (tmp_path / "disc.png").read_bytes().startswith(b"\x89PNG")


def test_a_teacher_with_its_lora_merged_paints_as_with_adapters_and_ignores_guidance():
    torch.manual_seed(0)
    unet = teacher.build_unet(block_out_channels=(32,) * 4, layers_per_block=1, norm_num_groups=8).eval()
    adapted = copy.deepcopy(unet)
    for layer in add_lora(adapted, 2).layers.values():
        layer.up.weight.data.normal_(std=0.1)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([999, 259]), torch.randn(2, 77, CONTEXT_WIDTH)
    student = load_unet(merged(unet, lora_state_dict(adapted)), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        expected, plain = adapted(x, t, context).sample, unet(x, t, context).sample
        for w in (0.0, 3.0):
            embedding = guidance_embedding(torch.full((2,), w), 256)
            torch.testing.assert_close(student(x, t, context, timestep_cond=embedding).sample, expected)
    assert (expected - plain).abs().mean() > 0.01


def test_weights_are_averaged_by_share():
    first, second = {"a": torch.tensor([0.0, 4.0])}, {"a": torch.tensor([4.0, 0.0], dtype=torch.float16)}
    torch.testing.assert_close(average(first, second, 0.25), {"a": torch.tensor([1.0, 3.0])})


def test_missing_icons_are_named(tmp_path, capsys):
    assert main(["recipe", "emoji", "--work", str(tmp_path / "work"), "--icons", str(tmp_path / "nowhere")]) == 2
    assert "node_modules" in capsys.readouterr().err
