"""What host_run.py tries with the host's own patches and conditioning: LCM KSampler beside the host's own nodes."""

from __future__ import annotations

import sys
from typing import Any

import comfy.controlnet
import comfy.k_diffusion.sampling
import comfy.sample
import comfy.samplers
import torch
from comfy_extras.nodes_custom_sampler import SplitSigmas
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from torch import Tensor

import nodes
from lcm_core.pipeline.sources import MODELS

SIDE, SEED, SCALE = 16, 3, 2.0
CONTROL = MODELS / "emoji" / "control" / "emoji_canny.safetensors"


def outputs(result: Any) -> Any:
    """Of a node of either generation."""
    return getattr(result, "args", result)


def graphs(suite: Any, model: Any) -> dict[str, dict[str, Any]]:
    """What each usual graph changes in the plain one's inputs."""
    positive, other, negative = (suite.prompts[name] for name in ("positive", "other", "negative"))
    left = torch.zeros(1, 8 * SIDE, 8 * SIDE)
    left[..., : 4 * SIDE] = 1
    ramp = torch.linspace(0, 1, 8 * SIDE).expand(1, 8 * SIDE, -1)
    picture = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(9)) * 4
    area = nodes.ConditioningSetArea().append(other, 4 * SIDE, 8 * SIDE, 4 * SIDE, 0, 1.0)[0]
    masked = nodes.ConditioningSetMask().append(other, left, "default", 1.0)[0]
    combine = nodes.ConditioningCombine().combine
    network = comfy.controlnet.load_controlnet(str(CONTROL))
    control = nodes.ControlNetApplyAdvanced().apply_controlnet
    outlines = control(positive, negative, network, ramp[..., None].expand(-1, -1, -1, 3), 1.0, 0.0, 1.0)
    file = suite.run("LCMLoraConvert", model=model, lora_name="peft.safetensors", save_as="for the stock loader")[2]
    soft = {"samples": picture, "noise_mask": ramp}
    return {
        "plain": {},
        "lora": {"model": nodes.LoraLoaderModelOnly().load_lora_model_only(model, file, 1.0)[0]},
        "hypertile": {"model": outputs(HyperTile.execute(model, 32, 3, 0, False))[0]},
        "pag": {"model": outputs(PerturbedAttentionGuidance.execute(model, 3.0))[0]},
        "area": {"positive": combine(positive, area)[0]},
        "mask of a prompt": {"positive": combine(positive, masked)[0]},
        "controlnet": {"positive": outlines[0], "negative": outlines[1]},
        "hard mask": {"latent": {"samples": picture, "noise_mask": left}},
        "soft mask": {"latent": soft},
        "differential": {"model": outputs(DifferentialDiffusion.execute(model))[0], "latent": soft},
    }


def beside(suite: Any, model: Any, positive: Any, negative: Any, latent: dict[str, Any]) -> tuple[Tensor, float]:
    """LCM KSampler's latents, and how far the stock lcm's are from them, of their largest number."""
    torch.manual_seed(SEED + 1)  # where another node left the stream that patches draw from
    given = {"positive": positive, "negative": negative, "latent_image": latent, "seed": SEED, "guidance_scale": SCALE}
    ours: Tensor = suite.run("LCMKSampler", model=model, sampler="lcm", **given)[0]["samples"]
    applied, sigmas = suite.run("LCMApply", model=model)[0], suite.run("LCMScheduler", model=model)[0]
    later = sys.modules["suite.nodes.sampling"].noise_of(latent, SEED)[1]
    stock = comfy.samplers.KSAMPLER(comfy.k_diffusion.sampling.sample_lcm, {"noise_sampler": later})
    noise, mask = comfy.sample.prepare_noise(latent["samples"], SEED), latent.get("noise_mask")
    if mask is not None:  # the host's own way into the size of latents takes single points
        mask = torch.nn.functional.interpolate(mask[:, None], (SIDE, SIDE), mode="area")
    given = {"noise_mask": mask, "seed": SEED}
    theirs = comfy.sample.sample_custom(
        applied, noise, SCALE, stock, sigmas, positive, negative, latent["samples"], **given
    )
    return ours, float((ours - theirs).abs().max() / theirs.abs().max())


def split(suite: Any, model: Any) -> float:
    """tcd without fresh noise in two halves, beside itself at once."""
    applied, sigmas = suite.run("LCMApply", model=model)[0], suite.run("LCMScheduler", model=model)[0]
    sampler, empty = suite.run("LCMSampler", sampler="tcd", gamma=0.0)[0], torch.zeros(1, 4, SIDE, SIDE)
    conds = suite.prompts["positive"], suite.prompts["negative"]

    def run(noise: Tensor, levels: Tensor, start: Tensor) -> Tensor:
        return comfy.sample.sample_custom(applied, noise, SCALE, sampler, levels, *conds, start, seed=SEED)

    noise = comfy.sample.prepare_noise(empty, SEED)
    high, low = outputs(SplitSigmas().get_sigmas(sigmas, 2))
    once, twice = run(noise, sigmas, empty), run(torch.zeros_like(noise), low, run(noise, high, empty))
    return float((once - twice).abs().max() / once.abs().max())


def try_patches(suite: Any) -> dict[str, Any]:
    """Every graph: how far from the stock nodes, and how far from the plain one or, with a mask, of what is kept."""
    model = suite.load("cfg.safetensors")[0]
    usual = {"model": model, "latent": {"samples": torch.zeros(1, 4, SIDE, SIDE)}}
    usual |= {name: suite.prompts[name] for name in ("positive", "negative")}
    found: dict[str, Any] = {}
    painted = {}
    for name, changes in graphs(suite, model).items():
        painted[name], found[name] = beside(suite, **usual | changes)
    moved = {name: float((latents - painted["plain"]).abs().max()) for name, latents in painted.items()}
    moved["differential"] = float((painted["differential"] - painted["soft mask"]).abs().max())
    return {"apart": found, "moved": moved, "split": split(suite, model)}
