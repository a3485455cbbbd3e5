"""What host_run.py tries with the host's own patches and conditioning: LCM KSampler beside the host's own nodes."""

from __future__ import annotations

import sys
from typing import Any

import comfy.k_diffusion.sampling
import comfy.sample
import comfy.samplers
import torch
from comfy_extras.nodes_custom_sampler import SplitSigmas
from host_graphs import SCALE, SEED, SIDE, conditionings, latents, outputs, patched_models, run, text_encoders
from torch import Tensor

Inputs = dict[str, Any]


def beside(suite: Any, model: Any, positive: Any, negative: Any, latent: Inputs) -> tuple[Tensor, float]:
    """LCM KSampler's latents, and how far the stock lcm's are from them, of their largest number."""
    torch.manual_seed(SEED + 1)  # where another node left the stream that patches draw from
    given = {"positive": positive, "negative": negative, "latent_image": latent, "seed": SEED, "guidance_scale": SCALE}
    ours: Tensor = suite.run("LCMKSampler", model=model, sampler="lcm", **given)[0]["samples"]
    applied, sigmas = suite.run("LCMApply", model=model)[0], suite.run("LCMScheduler", model=model)[0]
    theirs = comfy.sample.sample_custom(
        applied,
        noise_for(latent),
        SCALE,
        stock_lcm(latent),
        sigmas,
        positive,
        negative,
        latent["samples"],
        **kept(latent),
    )
    return ours, apart(ours, theirs)


def stock_lcm(latent: Inputs) -> Any:
    """The host's sampler, with the noise of ours."""
    later = sys.modules["suite.nodes.sampling"].noise_of(latent, SEED)[1]
    return comfy.samplers.KSAMPLER(comfy.k_diffusion.sampling.sample_lcm, {"noise_sampler": later})


def noise_for(latent: Inputs) -> Tensor:
    """The first noise of each picture; as the host's for a picture alone."""
    noise: Tensor = sys.modules["suite.nodes.sampling"].noise_of(latent, SEED)[0]
    return noise


def kept(latent: Inputs) -> Inputs:
    """The mask in the size of latents, by area: the host's own way there takes single points."""
    mask = latent.get("noise_mask")
    if mask is not None:
        mask = mask.reshape(-1, 1, *mask.shape[-2:])
        mask = torch.nn.functional.interpolate(mask, latent["samples"].shape[-2:], mode="area")
    return {"noise_mask": mask, "seed": SEED}


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def trajectories(suite: Any, rows: dict[str, Inputs]) -> dict[str, list[float]]:
    """tcd without fresh noise, which is Euler's method, beside the host's own: how far apart half way down, where the
    two must be equal; and at the end, where tcd has a trace of noise more."""
    found = {}
    for name, row in rows.items():
        model, latent = row["model"], row["latent"]
        sampler, sigmas = (
            suite.run("LCMSampler", sampler="tcd", gamma=0.0)[0],
            suite.run("LCMScheduler", model=model, strength=0.75)[0],
        )
        high = outputs(SplitSigmas().get_sigmas(sigmas, 3))[0]
        pairs = [
            [
                comfy.sample.sample_custom(
                    model,
                    noise_for(latent),
                    SCALE,
                    way,
                    levels,
                    row["positive"],
                    row["negative"],
                    latent["samples"],
                    **kept(latent),
                )
                for way in (sampler, comfy.samplers.ksampler("euler"))
            ]
            for levels in (high, sigmas)
        ]
        found[name] = [apart(*pair) for pair in pairs]
    return found


def guiders(suite: Any, model: Any) -> dict[str, float]:
    """LCM Sampler and the stock lcm behind the nodes that guide in another way."""
    positive, other, negative = (suite.prompts[name] for name in ("positive", "other", "negative"))
    applied, sigmas = suite.run("LCMApply", model=model)[0], suite.run("LCMScheduler", model=model)[0]
    empty = {"samples": torch.zeros(1, 4, SIDE, SIDE)}
    both = {"model": applied, "negative": negative}
    made = {
        "CFGGuider": run("nodes_custom_sampler", "CFGGuider", **both, positive=positive, cfg=SCALE),
        "BasicGuider": run("nodes_custom_sampler", "BasicGuider", model=applied, conditioning=positive),
        "DualCFGGuider": dual(both, positive, other),
        "PerpNegGuider": run(
            "nodes_perpneg",
            "PerpNegGuider",
            **both,
            positive=positive,
            empty_conditioning=other,
            cfg=SCALE,
            neg_scale=0.5,
        ),
    }

    def paint(guider: Any, sampler: Any) -> Tensor:
        result: Tensor = guider.sample(noise_for(empty), empty["samples"], sampler, sigmas, seed=SEED)
        return result

    ours = suite.run("LCMSampler")[0]
    return {name: apart(paint(guider, ours), paint(guider, stock_lcm(empty))) for name, guider in made.items()}


def dual(both: Inputs, positive: Any, other: Any) -> Any:
    """Two guidances."""
    scales = {"cfg_conds": 3.0, "cfg_cond2_negative": SCALE, "style": "regular"}
    return run("nodes_custom_sampler", "DualCFGGuider", **both, cond1=positive, cond2=other, **scales)


def split(suite: Any, model: Any) -> float:
    """tcd without fresh noise in two halves, beside itself at once."""
    applied, sigmas = suite.run("LCMApply", model=model)[0], suite.run("LCMScheduler", model=model)[0]
    sampler, empty = suite.run("LCMSampler", sampler="tcd", gamma=0.0)[0], torch.zeros(1, 4, SIDE, SIDE)
    conds = suite.prompts["positive"], suite.prompts["negative"]

    def paint(noise: Tensor, levels: Tensor, start: Tensor) -> Tensor:
        return comfy.sample.sample_custom(applied, noise, SCALE, sampler, levels, *conds, start, seed=SEED)

    noise = comfy.sample.prepare_noise(empty, SEED)
    high, low = outputs(SplitSigmas().get_sigmas(sigmas, 2))
    once, twice = paint(noise, sigmas, empty), paint(torch.zeros_like(noise), low, paint(noise, high, empty))
    return apart(twice, once)


def try_patches(suite: Any) -> dict[str, Any]:
    """Every graph: how far from the stock nodes, and how far from the plain one."""
    model, clip, vae, _ = suite.load("cfg.safetensors")
    usual = {"model": model, "latent": {"samples": torch.zeros(1, 4, SIDE, SIDE)}}
    usual |= {name: suite.prompts[name] for name in ("positive", "negative")}
    changes = patched_models(suite, model) | conditionings(suite) | text_encoders(suite, clip)
    changes |= latents(suite, model, vae)
    rows = {"plain": usual} | {name: usual | change for name, change in changes.items()}
    found: dict[str, float] = {}
    painted = {}
    for name, row in rows.items():
        painted[name], found[name] = beside(suite, **row)
    moved = {
        name: float((result[:1] - painted["plain"]).abs().max())
        for name, result in painted.items()
        if result.shape[1:] == painted["plain"].shape[1:]
    }
    moved["differential"] = float((painted["differential"] - painted["soft mask"]).abs().max())
    picture = {"latent": {"samples": rows["soft mask"]["latent"]["samples"]}}
    led = {name: rows[name] | picture for name in ("plain", "PAG", "area", "ControlNet")}
    led |= {name: rows[name] for name in ("hard mask", "soft mask", "differential")}
    return {
        "apart": found | guiders(suite, model),
        "moved": moved,
        "split": split(suite, model),
        "trajectories": trajectories(suite, led),
    }
