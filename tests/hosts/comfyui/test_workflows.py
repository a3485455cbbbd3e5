"""Every example workflow, run by a real ComfyUI and looked at."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from comfyui import PromptError, Server
from graphs import HOLE, SIZE, SKETCH, WORKFLOWS, Graph, prompt_of
from PIL import Image, ImageSequence

from lcm_core.pipeline import Pipeline

FOLDER = Path(__file__).resolve().parents[3] / "workflows"
COUNTS = {
    "LCM 04 Inpainting in 4 steps": 1,
    "LCM 05 Upscale in two passes": 1,
    "LCM 08 Latent travel animation": 12,
    "LCM 10 Compare steps in a grid": 1,
}  # pictures saved; else four
FLAT = 8.0  # grey levels; a plain colour has a spread of 0, noise one of 60 and more


def _frames(server: Server, outputs: dict[str, Any]) -> list[Image.Image]:
    saved = [image for output in outputs.values() for image in output.get("images", ()) if image["type"] == "output"]
    opened = [Image.open(io.BytesIO(server.file(image))) for image in saved]
    return [frame.convert("RGB") for picture in opened for frame in ImageSequence.Iterator(picture)]


def _picture(server: Server, name: str) -> Path:
    """An example picture that LCM Suite put into the host's input folder."""
    return server.base / "input" / name


def _api(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def _levels(image: Any) -> Any:
    return numpy.asarray(image, int)


@pytest.fixture(scope="session")
def painted(server: Server) -> dict[str, list[Image.Image]]:
    """The pictures of workflows that have run already."""
    return {}


def _paint(server: Server, painted: dict[str, list[Image.Image]], name: str) -> list[Image.Image]:
    if name not in painted:
        painted[name] = _frames(server, server.run(_api(name)))
    return painted[name]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_paints(server: Server, painted: dict[str, list[Image.Image]], name: str) -> None:
    """Wrong when a workflow fails, or gives another number of pictures, plain colours, or all the same."""
    frames = _paint(server, painted, name)
    assert len(frames) == COUNTS.get(name, 4)
    assert min(_levels(frame).std() for frame in frames) > FLAT
    if len(frames) > 1:
        assert len({frame.tobytes() for frame in frames}) > len(frames) // 2  # a loop comes back the way it went


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_shipped_file_is_what_the_description_says(name: str) -> None:
    """Wrong when graphs.py was changed and workflows/make.py was not run."""
    assert _api(name) == prompt_of(name)
    with Image.open(FOLDER / f"{name}.jpg") as thumbnail:
        assert max(thumbnail.size) == 384


def test_text_to_image_is_the_pipelines(server: Server, painted: dict[str, list[Image.Image]]) -> None:
    """Wrong when the nodes' guidance, timesteps or noise are not LCM's."""
    name = "LCM 01 Text to image in 4 steps"
    expected = Pipeline.load("emoji", device="cpu")("panda, noto style", seed=[1, 2, 3, 4]).images
    for ours, theirs in zip(expected, _paint(server, painted, name), strict=True):
        assert numpy.abs(_levels(ours) - _levels(theirs)).max() <= 1


def test_image_to_image_is_the_pipelines(server: Server, painted: dict[str, list[Image.Image]]) -> None:
    """Wrong when the strength is not exact."""
    pipe, sketch = Pipeline.load("emoji", device="cpu"), _picture(server, SKETCH)
    expected = pipe("red apple, fluent style", image=sketch, strength=0.7, seed=1).images[0]
    [theirs, *_] = _paint(server, painted, "LCM 03 Image to image in 4 steps")
    assert numpy.abs(_levels(expected) - _levels(theirs)).max() <= 1


def test_inpainting_keeps_what_was_not_masked(server: Server, painted: dict[str, list[Image.Image]]) -> None:
    """Wrong when the mask is turned round, or the hole is left as it was."""
    before = Image.open(_picture(server, HOLE))
    kept = _levels(before.getchannel("A")) == 255
    kept[:, : SIZE // 2 - 8] = True
    hole = _levels(before.getchannel("A")) == 0
    for after in _paint(server, painted, "LCM 04 Inpainting in 4 steps"):
        change = numpy.abs(_levels(after) - _levels(before.convert("RGB"))).mean(axis=-1)
        assert change[:, : SIZE // 2 - 8].mean() < change[hole].mean()
        assert change[:, : SIZE // 2 - 8].mean() < 25  # what the VAE itself changes


def test_the_second_pass_is_larger(server: Server, painted: dict[str, list[Image.Image]]) -> None:
    """Wrong when the upscale is lost."""
    assert [frame.size for frame in _paint(server, painted, "LCM 05 Upscale in two passes")] == [(SIZE, SIZE)]


def test_travel_starts_at_the_single_picture(server: Server, painted: dict[str, list[Image.Image]]) -> None:
    """Wrong when a keyframe of LCM Travel is not the picture that LCM KSampler paints."""
    g = Graph()
    model, clip, vae, *_ = g.full_lcm()
    g.save(g.paint(model, g.text(clip, "red apple, fluent style"), g.canvas(1)), vae, "keyframe")
    [single] = _frames(server, server.run(g.prompt))
    frames = _paint(server, painted, "LCM 08 Latent travel animation")
    assert numpy.abs(_levels(frames[0]) - _levels(single)).max() == 0
    steps = [numpy.abs(_levels(a) - _levels(b)).mean() for a, b in itertools.pairwise(frames)]
    assert max(steps) < numpy.abs(_levels(frames[0]) - _levels(frames[len(frames) // 2])).mean()


def test_mistakes_are_told_and_survived(server: Server) -> None:
    """Wrong when a bad input kills the server, leaves a traceback instead of a sentence, or spoils the next run."""
    missing = prompt_of("LCM 01 Text to image in 4 steps")
    missing["1"]["inputs"]["ckpt_name"] = "nowhere.safetensors"
    with pytest.raises(PromptError, match=r"nowhere\.safetensors"):
        server.run(missing)
    empty = prompt_of("LCM 08 Latent travel animation")
    travel = next(node for node in empty.values() if node["class_type"] == "LCMTravel")
    travel["inputs"]["seeds"] = "one, two"
    with pytest.raises(PromptError, match="is no list of numbers"):
        server.run(empty)
    strength = prompt_of("LCM 01 Text to image in 4 steps")
    sampler = next(node for node in strength.values() if node["class_type"] == "LCMKSampler")
    sampler["inputs"]["strength"] = 0.5
    with pytest.raises(PromptError, match="empty latent"):
        server.run(strength)
    sampler["inputs"].update(strength=1.0, seed=99)
    assert len(_frames(server, server.run(strength))) == 4


def test_a_lora_of_another_family_is_refused(server: Server) -> None:
    """Wrong when a LoRA that fits nothing is applied to nothing without a word."""
    import torch

    from lcm_core.files.lora import save_lora

    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    wide = {f"{key}.lora_down.weight": torch.ones(4, 1280), f"{key}.lora_up.weight": torch.ones(1280, 4)}
    wide[f"{key}.alpha"] = torch.tensor(4.0)
    save_lora(server.base / "models" / "loras" / "wide.safetensors", wide, "sdxl")
    g = Graph()
    model, clip, vae, *_ = g.full_lcm()
    settings = {"lora_name": "wide.safetensors", "strength_model": 1.0, "strength_clip": 1.0, "save_as": ""}
    model = g.add("LCMLoraConvert", model=model, **settings)[0]
    g.save(g.paint(model, g.text(clip, "pizza"), g.canvas(1)), vae, "wide")
    with pytest.raises(PromptError, match="made for this kind of model"):
        server.run(g.prompt)
    assert server.is_alive()
