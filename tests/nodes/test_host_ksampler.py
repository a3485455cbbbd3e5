"""LCM KSampler inside a real ComfyUI (COMFYUI_PATH), beside lcm_core on the same model, noise and settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcm_core.pipeline import generate
from lcm_core.pipeline.model import Model
from lcm_core.pipeline.settings import Settings
from lcm_core.pipeline.sources import find_source
from tests.nodes.host_setup import NEEDS_HOST, SIZE, encode, layout, run_host, save_tensors

pytestmark = NEEDS_HOST
SEED = 3
KINDS = ("epsilon", "v_prediction")


def sampling_cases() -> dict[str, dict[str, Any]]:
    """Inputs of the LCM KSampler by the name of the case, which begins with the model's."""
    cases: dict[str, dict[str, Any]] = {}
    for steps in range(1, 9):
        cases[f"full steps {steps}"] = {"steps": steps, "guidance_scale": 3.0}
        cases[f"cfg steps {steps}"] = {"steps": steps, "guidance_scale": 1.5}
    for scale in (3.0, 5.0, 9.0):
        cases[f"full w {scale - 1:g}"] = {"guidance_scale": scale}
    for strength in (0.3, 0.6, 0.77, 1.0):
        for sampler in ("lcm", "tcd"):
            image = {"strength": strength, "sampler": sampler, "latent": "image"}
            cases[f"full {sampler} strength {strength}"] = {"guidance_scale": 3.0, **image}
            cases[f"cfg {sampler} strength {strength}"] = {"guidance_scale": 1.5, **image}
    for gamma in (0.0, 1.0):
        cases[f"full tcd gamma {gamma:g}"] = {"guidance_scale": 3.0, "sampler": "tcd", "gamma": gamma, "steps": 5}
    cases["cfg own timesteps"] = {"guidance_scale": 1.0, "timesteps": "800, 433, 21"}
    cases["full original_steps 25"] = {"guidance_scale": 3.0, "original_steps": 25, "steps": 3}
    return cases


def inputs_of(model: Model, seed: int, scale: float, prompt: str = "positive", image: Any = None) -> generate.Inputs:
    """What lcm_core paints from."""
    guided = model.guidance_embedding_dim is None and scale != 1
    noise = generate.noise_source([seed], torch.device("cpu"))
    x0 = None if image is None else image * model.vae.scaling_factor
    return generate.Inputs(encode(model, prompt), encode(model, "negative") if guided else None, noise, x0=x0)


def settings_of(case: dict[str, Any]) -> Settings:
    """lcm_core's settings of a case."""
    own = {"steps": "num_inference_steps"}
    given = {own.get(key, key): value for key, value in case.items() if key != "latent"}
    if "timesteps" in given:
        given["timesteps"] = tuple(int(word) for word in given["timesteps"].split(","))
        given["num_inference_steps"] = len(given["timesteps"])
    return replace(Settings(**given), width=8 * SIZE, height=8 * SIZE)


@pytest.mark.parametrize("prediction", KINDS)
def test_the_ksampler_paints_as_lcm_core_does(tmp_path: Path, prediction: str) -> None:
    """Steps 1 to 8, strengths .3 to 1, lcm and tcd, guidance as w and as CFG: within 1e-4; and pictures follow w."""
    models = layout(tmp_path, prediction)
    image = save_tensors(tmp_path, models["full"])
    cases = sampling_cases()
    told = [
        {
            "model": f"{name.split()[0]}.safetensors",
            "seed": SEED,
            "latent": case.get("latent", "empty"),
            "inputs": {key: value for key, value in case.items() if key != "latent"},
        }
        for name, case in cases.items()
    ]
    (tmp_path / "cases.json").write_text(json.dumps(told))
    assert run_host(tmp_path) == {}  # no complaints
    results = load_file(tmp_path / "results.safetensors")
    wrong = {}
    for number, (name, case) in enumerate(cases.items()):
        model, settings = models[name.split()[0]], settings_of(case)
        x0 = image if "latent" in case else None
        expected = generate.paint(model, inputs_of(model, SEED, settings.guidance_scale, image=x0), settings)
        scale = model.vae.scaling_factor  # the bar is for the sampler's own latents, of unit size
        if prediction != find_source("emoji").info.prediction_type:  # misread, a network gives latents of another size
            scale = min(scale, 1 / float(expected.std()))
        difference = float((results[str(number)] - expected).abs().max()) * scale
        if not difference <= 1e-4:
            wrong[name] = difference
    assert not wrong
    w2, w8 = (results[str(list(cases).index(f"full w {w}"))] for w in (2, 8))
    assert (w2 - w8).abs().max() > 0.05
