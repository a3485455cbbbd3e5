"""The pipeline paints with every flow family what diffusers' own pipeline paints with the same scheduler."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch

from lcm_core.pipeline import PictureOptions, Pipeline
from lcm_core.pipeline.generate import make_inputs, paint
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
    scale = "true_cfg_scale" if kind == "QwenImagePipeline" else "guidance_scale"
    options |= {"max_sequence_length": 512} if kind == "WanPipeline" else {}
    result = pipe(prompt=PROMPT, num_inference_steps=STEPS, **{scale: guidance}, **options)
    return result.frames[0][0] if hasattr(result, "frames") else result.images[0]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_is_that_of_diffusers(model_of, family, guidance):
    """Text, packing, places, timesteps, shift, guidance and VAE: a fault in any of them would change every pixel."""
    if family == "qwen-image" and guidance != 1:
        pytest.skip("diffusers' pipeline rescales the guided velocity of each token")
    folder = model_of(family)
    pipe = Pipeline.load(folder, device="cpu", dtype="float32")
    asked = PictureOptions(sampler="euler", num_inference_steps=STEPS, guidance_scale=guidance, width=SIDE, height=SIDE)
    settings = replace(pipe.resolve(asked), prompt=PROMPT, seed=1)
    inputs = make_inputs(pipe.model, [settings])
    ours = (paint(pipe.model, inputs, settings)[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
    asked = guidance - 1 if family == "z-image" else guidance  # its pipeline counts from 0, as papers count w
    theirs = torch.as_tensor(diffusers_picture(folder, MODELS[family][1], asked))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert float(theirs.std()) > 1e-3
