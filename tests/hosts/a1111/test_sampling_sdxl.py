"""An SDXL checkpoint in the real web UI (A1111 only: Forge builds SDXL in its usual size alone).

It is the embedded model, dressed as SDXL: sgm's classes, and a dict of conditioning with a vector, whose layers are 0.
So it must paint the embedded model's pictures.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sampling_references import check, diffusers_timesteps
from webui_harness import WebUI, difference

from lcm_core.pipeline import Pipeline

pytestmark = pytest.mark.host
_SGM = "sgm.modules"
_SIZES = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
_VECTOR = 2 * len(_SIZES) * 32


def dress(webui: WebUI, name: str) -> None:
    """Write `sdxl_NAME` beside the exported checkpoint."""
    folder = webui.data / "models" / "Stable-diffusion"
    renamed = {
        key.replace("cond_stage_model.", "conditioner.embedders.0."): tensor
        for key, tensor in load_file(folder / f"{name}.safetensors").items()
    }
    width = renamed["model.diffusion_model.time_embed.2.weight"].shape[0]
    for layer, inputs in ((0, _VECTOR), (2, width)):
        renamed[f"model.diffusion_model.label_emb.0.{layer}.weight"] = torch.zeros(width, inputs)
        renamed[f"model.diffusion_model.label_emb.0.{layer}.bias"] = torch.zeros(width)
    # by this the host knows that the text encoders are in the file
    renamed["conditioner.embedders.1.model.ln_final.weight"] = torch.zeros(1)
    save_file(renamed, folder / f"sdxl_{name}.safetensors")
    description = yaml.safe_load((folder / f"{name}.yaml").read_text("utf-8"))
    (folder / f"sdxl_{name}.yaml").write_text(yaml.safe_dump(_sgm(description["model"]["params"])), "utf-8")


def _sgm(ldm: dict[str, Any]) -> dict[str, Any]:
    scaling = "VScaling" if ldm["parameterization"] == "v" else "EpsScaling"
    parts = f"{_SGM}.diffusionmodules"
    denoiser = {
        "num_idx": 1000,
        "weighting_config": {"target": f"{parts}.denoiser_weighting.EpsWeighting"},
        "scaling_config": {"target": f"{parts}.denoiser_scaling.{scaling}"},
        "discretization_config": {"target": f"{parts}.discretizer.LegacyDDPMDiscretization"},
    }
    unet = ldm["unet_config"]["params"] | {"num_classes": "sequential", "adm_in_channels": _VECTOR}
    unet.pop("image_size", None)
    text = {"version": ldm["cond_stage_config"]["params"]["version"], "layer": "last"}
    embedders = [_embedder("txt", "FrozenCLIPEmbedder", text)]
    embedders += [_embedder(size, "ConcatTimestepEmbedderND", {"outdim": 32}) for size in _SIZES]
    params = {
        "scale_factor": ldm["scale_factor"],
        "disable_first_stage_autocast": True,
        "denoiser_config": {"target": f"{parts}.denoiser.DiscreteDenoiser", "params": denoiser},
        "network_config": {"target": f"{parts}.openaimodel.UNetModel", "params": unet},
        "conditioner_config": {"target": f"{_SGM}.GeneralConditioner", "params": {"emb_models": embedders}},
        "first_stage_config": ldm["first_stage_config"]
        | {"target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper"},
    }
    return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": params}}


def _embedder(key: str, kind: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"is_trainable": False, "input_key": key, "target": f"{_SGM}.encoders.modules.{kind}", "params": params}


@cache
def pipeline(unet: str) -> Pipeline:
    return Pipeline.load("emoji", device="cpu", dtype="float32", unet=unet)


def load(webui: WebUI, name: str) -> None:
    if webui.is_forge:
        pytest.skip("Forge builds SDXL in its usual size only")
    if not (webui.data / "models" / "Stable-diffusion" / f"sdxl_{name}.yaml").exists():
        dress(webui, name)
        webui.call("/sdapi/v1/refresh-checkpoints", {})
    webui.load(f"sdxl_{name}")


@pytest.mark.parametrize(("guidance_scale", "batch"), [(1.0, 1), (3.0, 2)])
@pytest.mark.parametrize("sampler", ["LCM Suite", "TCD Suite"])
def test_sdxl_with_and_without_negative_pass(webui: WebUI, sampler: str, guidance_scale: float, batch: int) -> None:
    load(webui, "emoji_teacher")
    painted = webui.paint(sampler_name=sampler, cfg_scale=guidance_scale, negative_prompt="a face, twemoji style")
    check(painted, sampler, diffusers_timesteps(4), batch)
    wanted = pipeline("teacher")(
        "pizza, noto style",
        "a face, twemoji style",
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        seed=1,
        width=64,
        height=64,
        sampler=sampler[:3].lower(),
    )
    assert difference(painted.pictures[0], wanted.images[0]) <= 1


def test_full_sdxl_lcm_takes_guidance_as_embedding(webui: WebUI) -> None:
    load(webui, "emoji_lcm")
    painted = webui.paint(sampler_name="LCM Suite", cfg_scale=3)
    assert painted.batches == [1] * 4
    wanted = pipeline("lcm")("pizza, noto style", guidance_scale=3.0, seed=1, width=64, height=64, sampler="lcm")
    assert difference(painted.pictures[0], wanted.images[0]) <= 1
