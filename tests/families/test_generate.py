"""The pipeline paints with every flow family what diffusers' own pipeline paints with the same scheduler."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch

from lcm_core.errors import InputError
from lcm_core.families.family import scheduled_shift
from lcm_core.families.patches import from_patches
from lcm_core.pipeline import PictureOptions, Pipeline
from lcm_core.pipeline.generate import make_inputs, paint
from lcm_core.pipeline.parts import open_text
from lcm_core.pipeline.scheduler import LCMSuiteScheduler
from lcm_core.pipeline.sources import find_source
from tests.flow_models import MODELS

PROMPT, STEPS, SIDE = "a red apple", 3, 32


def diffusers_picture(folder, kind, guidance, wan_frames=1):
    """(H, W, 3) in [0, 1], with the even grid that all but SD3's and Wan's pipelines take by themselves."""
    import diffusers

    pipe = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    takes = inspect.signature(type(pipe).__call__).parameters
    options = {"generator": torch.Generator().manual_seed(1), "height": SIDE, "width": SIDE, "output_type": "np"}
    if "sigmas" in takes:
        options["sigmas"] = np.linspace(1.0, 1 / STEPS, STEPS).tolist()
    else:
        set_timesteps = pipe.scheduler.set_timesteps
        even = np.linspace(1.0, 1 / STEPS, STEPS).tolist()
        pipe.scheduler.set_timesteps = lambda steps, device: set_timesteps(sigmas=even, device=device)
        options["num_frames"] = wan_frames
    scale = "guidance_scale"
    if kind == "QwenImagePipeline":
        scale, options["negative_prompt"] = "true_cfg_scale", "" if guidance > 1 else None
    options |= {"max_sequence_length": 512} if kind == "WanPipeline" else {}
    result = pipe(prompt=PROMPT, num_inference_steps=STEPS, **{scale: guidance}, **options)
    return result.frames[0][0] if hasattr(result, "frames") else result.images[0]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_is_that_of_diffusers(model_of, family, guidance, monkeypatch):
    """Text, packing, places, timesteps, shift, guidance and VAE: a fault in any of them would change every pixel."""
    folder = model_of(family)
    pipe = Pipeline.load(folder, device="cpu", dtype="float32")
    asked = PictureOptions(sampler="euler", num_inference_steps=STEPS, guidance_scale=guidance, width=SIDE, height=SIDE)
    settings = replace(pipe.resolve(asked), prompt=PROMPT, seed=1)
    inputs = make_inputs(pipe.model, [settings])
    ours = (paint(pipe.model, inputs, settings)[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
    asked = guidance - 1 if family == "z-image" else guidance  # its pipeline counts from 0, as papers count w
    if (
        family == "qwen-image"
    ):  # its pipeline gives each guided token its former length, for which this leaves no reason
        norm, asks = torch.norm, {"dim": -1, "keepdim": True}
        monkeypatch.setattr(torch, "norm", lambda *x, **more: torch.ones(1) if more == asks else norm(*x, **more))
    theirs = torch.as_tensor(diffusers_picture(folder, MODELS[family][1], asked))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert float(theirs.std()) > 1e-3


@pytest.mark.parametrize(
    ("asked", "used"),
    [(None, torch.bfloat16), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.bfloat16)],
)
def test_who_asks_for_float32_gets_bfloat16_on_a_processor_that_has_it(model_of, monkeypatch, asked, used):
    """The same seed then gave another picture on another processor; float16 is too narrow for language models."""
    monkeypatch.setattr("lcm_core.networks.device._cpu_has_bfloat16", lambda: True)
    text = open_text(find_source(model_of("sd3")), torch.device("cpu"), asked)
    assert text.dtype == used


@pytest.mark.parametrize(
    ("family", "sampler"), [*(("sd3", name) for name in ("lcm", "tcd", "euler")), ("flux", "euler")]
)
def test_the_scheduler_gives_diffusers_pipeline_other_numbers(model_of, family, sampler):
    """Flux's pipeline draws its noise in patches, so that only without it numbers can be compared."""
    import diffusers

    pipe = getattr(diffusers, MODELS[family][1]).from_pretrained(model_of(family), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMSuiteScheduler.from_config(pipe.scheduler.config, sampler=sampler)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "width": SIDE, "height": SIDE}
    settings["output_type"] = "latent"
    torch.manual_seed(5)
    torch.randn(1, 16, SIDE // 8, SIDE // 8)  # these pipelines draw the first noise alone from their generator
    theirs = pipe(PROMPT, generator=torch.Generator().manual_seed(5), **settings).images
    ours = Pipeline.load(model_of(family), device="cpu", dtype="float32")(PROMPT, seed=5, sampler=sampler, **settings)
    given = from_patches(theirs, SIDE // 16) if family == "flux" else theirs
    torch.testing.assert_close(given, ours.images, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "stated",
    [
        *({"shift": 0}, {"shift": -3.0}, {"flow_shift": 1e9}),
        {"use_dynamic_shifting": True, "base_image_seq_len": 256, "max_image_seq_len": 256},
        {"use_dynamic_shifting": True, "max_shift": 1e6},
    ],
    ids=str,
)
def test_a_shift_that_no_flow_has_is_sampled_with(stated):
    """Some ended in a division by zero or an overflow, others in noise."""
    with pytest.raises(InputError, match="states a shift of"):
        scheduled_shift(stated, 4096, 4)


def test_a_number_of_timesteps_is_a_text(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"num_train_timesteps": "1000"}')
    with pytest.raises(InputError, match="says num_train_timesteps = '1000'"):
        find_source(tmp_path)
