"""What the emoji recipe trains on: composed pictures whose captions say what they show, and batches of any size."""

import json

import pytest
import torch

from lcm_core.files.safetensors import write_safetensors
from trainer.config import LoopConfig
from trainer.recipes.emoji.autoencoder import psnr, random_view
from trainer.recipes.emoji.colours import HUES, main_hue, recolour
from trainer.recipes.emoji.data import Drawing, Drawings, load_shipped, save_shipped
from trainer.recipes.emoji.features import FIRST_WIDTHS, WIDTHS, FeatureNetwork, extract, load_features, save_features
from trainer.recipes.emoji.latents import CaptionedLatents
from trainer.recipes.emoji.plan import plan_loop
from trainer.recipes.emoji.scenes import GROUNDS, Scene, coloured_name, draw_scene, paste, plural, resize


def _drawing(label: str, style: str = "noto", group: str = "food", code: str = "1f34e") -> Drawing:
    return Drawing(code, label, (), group, style, False)


def _disc(red: int, green: int, blue: int, size: int = 64) -> torch.Tensor:
    """A filled circle (4, S, S) over the middle half, opaque, on nothing."""
    line = torch.arange(size) - size / 2 + 0.5
    inside = (line[:, None] ** 2 + line**2 < (size / 4) ** 2).to(torch.uint8)
    return torch.stack([inside * value for value in (red, green, blue, 255)])


def test_a_pasted_drawing_covers_by_its_opacity_and_may_stick_out():
    drawing = torch.full((4, 8, 8), 127.5)
    drawing[0] = 127.5  # red 255 at half opacity, multiplied
    drawing[1:3] = 0
    ground = torch.full((3, 16, 16), 100.0)
    paste(ground, drawing, -4, 12, 8)
    torch.testing.assert_close(ground[:, 0, 15], torch.tensor([127.5 + 50, 50, 50]))
    assert (ground[:, 4:] == 100).all()
    assert (ground[:, :, :12] == 100).all()


def test_resizing_takes_means():
    picture = torch.rand(1, 3, 16, 16)
    smaller = resize(picture, 8)
    assert smaller.shape == (1, 3, 8, 8)
    torch.testing.assert_close(smaller.mean(), picture.mean(), rtol=0.02, atol=0)


@pytest.mark.parametrize("colour", HUES)
def test_a_red_thing_takes_any_colour_and_keeps_its_lightness_and_shape(colour):
    drawing = _disc(200, 60, 60).float()
    assert main_hue(drawing) == pytest.approx(0.0, abs=0.5)
    turned = recolour(drawing, colour)
    hue = main_hue(turned)
    assert abs((hue - HUES[colour] + 180) % 360 - 180) < 3
    torch.testing.assert_close(turned[3], drawing[3])
    torch.testing.assert_close(turned[:3].mean(), drawing[:3].mean(), rtol=1e-3, atol=0)
    assert (turned[:3] <= turned[3:]).all()


def test_grey_and_many_coloured_things_have_no_colour():
    assert main_hue(_disc(120, 120, 120).float()) is None
    both = _disc(220, 0, 0).float()
    both[:, :, 32:] = _disc(0, 0, 220).float()[:, :, 32:]
    assert main_hue(both) is None


@pytest.mark.parametrize(
    ("one", "several"),
    [
        ("red apple", "red apples"),
        ("slice of pizza", "slices of pizza"),
        ("cherry", "cherries"),
        ("monkey", "monkeys"),
        ("cat with wry smile", "cats with wry smile"),
        ("fox", "foxes"),
        ("glasses", "glasses"),
        ("waving hand: dark skin tone", "waving hands: dark skin tone"),
    ],
)
def test_names_of_several(one, several):
    assert plural(one) == several


def test_a_new_colour_takes_the_place_of_the_old_one_in_a_name():
    assert coloured_name("red apple", "blue") == "blue apple"
    assert coloured_name("octopus", "green") == "green octopus"
    assert coloured_name("red apple", "") == "red apple"


def test_a_scene_shows_as_many_things_as_its_caption_says():
    """Two blue apples on a yellow ground are two blue spots with yellow between and around them."""
    images = torch.stack([_disc(210, 40, 40)])
    scene = Scene((0, 0), "yellow", "blue", seed=3)
    caption = scene.caption([_drawing("red apple")], torch.Generator().manual_seed(0))
    assert caption.startswith("two blue apples")
    assert "yellow" in caption
    assert caption.endswith(", noto style")
    picture = scene.picture(images, 64)
    assert picture.shape == (3, 64, 64)
    row = picture[:, 32]
    blue = (row[2] > row[0]).int()
    assert int((blue.diff() == 1).sum()) == 2
    torch.testing.assert_close(picture[:, 0, 0], torch.tensor(GROUNDS["yellow"]).float(), rtol=0, atol=50)
    assert torch.equal(picture, scene.picture(images, 64))


def test_scenes_use_allowed_drawings_alone_and_pairs_keep_to_one_style():
    styles = ("noto", "fluent")
    entries = [_drawing(f"thing {i}", styles[i % 2], code=f"1f3{i:02}") for i in range(20)]
    images = torch.stack([_disc(200, 40, 40)] * 20)
    allowed = torch.arange(0, 20, 3)
    scenes = [draw_scene(entries, images, allowed, seed) for seed in range(200)]
    assert {i for s in scenes for i in s.drawings} <= set(allowed.tolist())
    assert all(len({entries[i].style for i in s.drawings}) == 1 for s in scenes)
    assert any(s.is_pair for s in scenes)
    assert {len(s.drawings) for s in scenes} == {1, 2, 3, 4}
    assert scenes[:20] == [draw_scene(entries, images, allowed, seed) for seed in range(20)]


def test_batches_caption_the_picture_that_they_show(tmp_path):
    """Each latent is marked with its own number; the caption must be of that number."""
    from trainer.recipes.emoji.words import build_tokenizer

    entries = [_drawing(name, code=code) for name, code in (("apple", "a"), ("bus", "b"), ("cat", "c"))]
    scenes = [Scene((1,), "white", "", 0), Scene((2, 2), "white", "", 1)]
    drawings = Drawings(torch.zeros(3, 4, 64, 64, dtype=torch.uint8), entries)
    tokenizer = build_tokenizer(drawings, tmp_path)
    marked = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 4, 8, 8).half()
    data = CaptionedLatents({64: marked}, torch.tensor([0, 2]), {64: scenes}, drawings, tokenizer)
    latents, tokens = data.batch(64, 64, torch.Generator().manual_seed(0))
    words = ("apple", "cat", "bus", "two")
    for latent, line in zip(latents, tokens, strict=True):
        caption = tokenizer.decode(line.tolist(), skip_special_tokens=True)
        assert words[int(latent[0, 0, 0])] in caption or caption.startswith("noto style")
    assert set(latents[:, 0, 0, 0].tolist()) == {0, 1, 2, 3}


def test_views_for_the_vae_show_the_drawing_at_full_resolution_and_smaller():
    drawing = _disc(10, 20, 30, 128)
    generator = torch.Generator().manual_seed(0)
    views = torch.stack([random_view(drawing, 64, generator) for _ in range(40)])
    assert views.shape == (40, 3, 64, 64)
    assert float(views.min()) >= 0
    assert float(views.max()) <= 255
    assert sum(bool((view == torch.tensor([10.0, 20, 30])[:, None, None]).all(0).any()) for view in views) > 20


def test_psnr_is_that_of_the_formula():
    class Shift(torch.nn.Module):
        def encode(self, pixels):
            mean = pixels + torch.tensor([0.1, 0.2]).view(2, 1, 1, 1)
            return type("Out", (), {"latent_dist": type("Dist", (), {"mean": mean})})

        def decode(self, latents):
            return type("Out", (), {"sample": latents})

    images = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    expected = (10 * torch.log10(torch.tensor([4 / 0.1**2, 4 / 0.2**2]))).mean()
    assert psnr(Shift(), images, torch.device("cpu")) == pytest.approx(float(expected), abs=0.01)


def _done(folder, step):
    write_safetensors(folder / "state.safetensors", {"x": torch.zeros(1)}, {"step": str(step)})


def test_larger_batches_take_fewer_steps_of_what_is_left(tmp_path):
    config = LoopConfig(steps=1000, batch_size=8, learning_rate=1e-3, ema_decay=0.99)
    assert plan_loop(tmp_path, config, 1).steps == 1000
    _done(tmp_path, 400)
    assert plan_loop(tmp_path, config, 1).steps == 1000
    gpu = plan_loop(tmp_path, config, 8)
    assert gpu.steps == 400 + 75
    assert gpu.batch_size == 64
    assert gpu.ema_decay == pytest.approx(0.99**8)
    _done(tmp_path, 400 + 25)
    assert plan_loop(tmp_path, config, 8).steps == 475  # the same command has the same plan
    back = plan_loop(tmp_path, config, 1)
    assert back.steps == 425 + 400
    assert back.batch_size == 8
    assert json.loads((tmp_path / "plan.json").read_text())["steps"] == 825


def test_a_stage_that_is_done_stays_done(tmp_path):
    config = LoopConfig(steps=1000, batch_size=8, learning_rate=1e-3)
    plan_loop(tmp_path, config, 1)
    _done(tmp_path, 1000)
    assert plan_loop(tmp_path, config, 16).steps == 1000


@pytest.mark.parametrize(("size", "widths"), [(64, FIRST_WIDTHS), (128, WIDTHS)])
def test_a_feature_network_is_read_as_it_was_written_and_sees_pictures_at_its_size(tmp_path, size, widths):
    torch.manual_seed(0)
    network = FeatureNetwork(size, widths).eval()
    save_features(tmp_path / "features.safetensors", network)
    again = load_features(tmp_path / "features.safetensors")
    coarse = torch.rand(2, 3, 4, 4) * 255
    images, large = (resize(coarse, side).byte() for side in (size, 2 * size))
    torch.testing.assert_close(extract(again, images), extract(network, images), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(extract(again, large), extract(again, images), rtol=0.05, atol=0.05)


def test_shipped_latents_are_rounded_by_a_hundredth_of_their_spread(tmp_path):
    latents, features = torch.randn(5, 4, 16, 16), torch.randn(6, 128)
    entries = [_drawing(f"thing {i}") for i in range(5)]
    entries.append(Drawing("1f3ff", "kept", (), "food", "noto", True))
    save_shipped(tmp_path, entries, latents, {"features": features})
    again, captions = load_shipped(tmp_path)
    assert captions == [f"thing {i}, noto style" for i in range(5)]
    torch.testing.assert_close(again, latents, rtol=0, atol=0.5 / 24 + 1e-6)
