"""Class-conditional models are painted with as diffusers does it, by names that lead to the right labels."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lcm_core.cli.main import main
from lcm_core.errors import InputError
from lcm_core.families.guidance_input import guidance_weights
from lcm_core.families.known import find_family
from lcm_core.families.network import build_label_network
from lcm_core.files.checkpoint import read_component
from lcm_core.pipeline import PictureOptions, Pipeline
from lcm_core.pipeline.generate import make_inputs, paint
from lcm_core.pipeline.image import read_settings
from tests.class_models import KINDS, build_network, models_in

STEPS = 3


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return models_in(tmp_path_factory.mktemp("classes"))


def our_picture(folder, guidance, **asked):
    """(3, H, W) in [0, 1]."""
    pipe = Pipeline.load(folder, device="cpu", dtype="float32")
    options = PictureOptions(sampler="euler", num_inference_steps=STEPS, guidance_scale=guidance, **asked)
    settings = replace(pipe.resolve(options), seed=1)
    return (paint(pipe.model, make_inputs(pipe.model, [settings]), settings)[0] / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_dits_picture_is_that_of_diffusers_own_pipeline(folder_of, guidance):
    """Labels, the label for none, the variances that are left out, places of patches, VAE: each would show."""
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(folder_of("dit"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        pipe.get_label_ids(["dog"]) if pipe.labels else [1],
        guidance,
        torch.Generator().manual_seed(1),
        STEPS,
        output_type="pt",
    ).images[0]
    ours = our_picture(folder_of("dit"), guidance, class_name="dog")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert float((ours - our_picture(folder_of("dit"), guidance, class_name="bird")).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_unets_picture_is_that_of_its_own_class_and_scheduler(folder_of, kind, guidance):
    """The label 1 for the dog, and 3, which has no name, for none."""
    from diffusers import AutoencoderKL, DDIMScheduler

    folder, network = folder_of(kind), build_network(kind)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    scheduler.set_timesteps(STEPS)
    text = (None,) if kind == "UNet2DConditionModel" else ()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for t in scheduler.timesteps:
            named, none = (network(x, t, *text, class_labels=torch.tensor([label])).sample for label in (1, 3))
            x = scheduler.step(none + guidance * (named - none), t, x).prev_sample
        theirs = (vae.decode(x / vae.config.scaling_factor).sample[0] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(our_picture(folder, guidance, class_name="dog"), theirs, rtol=0, atol=1e-4)


def test_a_class_is_named_by_any_of_its_names_its_number_or_the_prompt(folder_of):
    folder = folder_of("UNet2DModel")
    first = our_picture(folder, 1.0, class_name="cat")
    for asked in ({"class_name": "tabby"}, {"class_name": "0"}, {"prompt": "cat"}):
        assert torch.equal(our_picture(folder, 1.0, **asked), first)


def test_what_is_no_class_is_refused_by_name(folder_of):
    folder = folder_of("UNet2DModel")
    with pytest.raises(InputError, match="no class 'bord'; choose one of bird"):
        our_picture(folder, 1.0, class_name="bord")
    with pytest.raises(InputError, match="both the class 'dog' and the prompt 'a dog'"):
        our_picture(folder, 1.0, class_name="dog", prompt="a dog")
    with pytest.raises(InputError, match="emoji paints by prompts"):
        our_picture("emoji", 1.0, class_name="dog")


def test_a_model_without_a_label_for_none_is_not_guided(folder_of, tmp_path):
    """Without names each of the four labels is a class."""
    (tmp_path / "model").symlink_to(folder_of("UNet2DModel"))
    for part in ("unet", "vae", "scheduler"):
        (tmp_path / part).symlink_to(folder_of("UNet2DModel") / part)
    assert our_picture(tmp_path, 1.0, class_name="3").shape == (3, 16, 16)
    with pytest.raises(InputError, match="no label for no class"):
        our_picture(tmp_path, 3.0, class_name="3")


def test_labels_that_the_network_does_not_have_are_refused(folder_of, tmp_path):
    for part in ("unet", "vae", "scheduler"):
        (tmp_path / part).symlink_to(folder_of("UNet2DModel") / part)
    for odd in ({"4": "fish"}, {"x": "fish"}, {"0": 1}, ["fish"]):
        (tmp_path / "model_index.json").write_text(json.dumps({"id2label": odd}))
        with pytest.raises(InputError, match="id2label"):
            Pipeline.load(tmp_path, device="cpu")


def test_generate_takes_a_class_and_a_picture_of_it_is_made_again(folder_of, tmp_path):
    words = ["generate", "--model", str(folder_of("dit")), "--device", "cpu", "--steps", "2", "--sampler", "euler"]
    assert main([*words, "--class", "dog", "--output", str(tmp_path / "dog.png")]) == 0
    stored = read_settings(tmp_path / "dog.png")
    assert stored["prompt"] == "dog"
    assert main(["generate", "--from", str(tmp_path / "dog.png"), "--output", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "dog.png").read_bytes()
    other = ["--class", "bird", "--output", str(tmp_path / "bird.png")]
    assert main(["generate", "--from", str(tmp_path / "dog.png"), *other]) == 0
    assert read_settings(tmp_path / "bird.png")["prompt"] == "bird"


@pytest.mark.parametrize("kind", KINDS)
def test_a_guidance_input_changes_nothing_at_first_and_then_every_timestep(folder_of, kind):
    """Each embedding of the timestep gets cond_proj(embedding of w), as UNet2DConditionModel does by itself."""
    family = find_family(folder_of(kind))
    plain = read_component(folder_of(kind) / family.folder, "unet")
    tensors = {**plain.tensors, **guidance_weights(plain.tensors, 16)}
    component = replace(plain, tensors=tensors, config={**plain.config, "time_cond_proj_dim": 16})
    x, t, labels, w = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.tensor([1]), torch.randn(1, 16)
    networks = [build_label_network(family, part, torch.device("cpu")) for part in (plain, component)]
    before, after = (family.predict(network, x, t, labels) for network in networks)
    assert torch.equal(before, after)
    assert torch.equal(before, family.predict(networks[1], x, t, labels, w))
    for name in component.tensors.keys() - plain.tensors.keys():
        component.tensors[name] = torch.ones_like(component.tensors[name])
    guided = build_label_network(family, component, torch.device("cpu"))
    assert float((family.predict(guided, x, t, labels, w) - before).abs().max()) > 1e-4
    assert torch.equal(family.predict(guided, x, t, labels), before)


def test_two_classes_have_nothing_between_them(folder_of):
    from lcm_core.pipeline import Keyframe

    pipe = Pipeline.load(folder_of("UNet2DModel"), device="cpu")
    options = PictureOptions(sampler="euler", num_inference_steps=1, guidance_scale=1.0)
    same = list(pipe.interpolate([Keyframe("dog", 1), Keyframe("dog", 2)], 3, options=options))
    assert len(same) == 3
    with pytest.raises(InputError, match="nothing between two classes"):
        list(pipe.interpolate([Keyframe("dog", 1), Keyframe("cat", 2)], 3, options=options))
