"""What host_run.py tries beyond the suite's own sampling: flow models, and the host's own loaders, savers and lists."""

from __future__ import annotations

from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models
import folder_paths
import torch
from comfy_extras import nodes_model_advanced

import nodes

X0 = 2.0
SIZES = {
    "in_channels": 16,
    "patch_size": 2,
    "depth": 1,
    "input_size": None,
    "adm_in_channels": 64,
    "pos_embed_max_size": 32,
    "pos_embed_scaling_factor": None,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 64}},
}
"""A tiny Stable Diffusion 3."""


def message_of(function: Any, *args: Any, **kwargs: Any) -> str:
    """What a call that must fail says."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def tiny_sd3(fed: list[list[float]]) -> Any:
    """A MODEL of the host's own class whose x0 is known; `fed` is given s, mean and spread of each of its inputs."""
    config = comfy.supported_models.SD3(dict(SIZES))
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_patcher.ModelPatcher(
        comfy.model_base.SD3(config), torch.device("cpu"), torch.device("cpu"), size=1
    )

    def oracle(apply: Any, given: dict[str, Any]) -> torch.Tensor:
        x = given["input"]
        assert apply(x, given["timestep"], **given["c"]).shape == x.shape  # the real network takes it
        fed.append([float(given["timestep"][0]), float(x.mean()), float(x.std())])
        return torch.full_like(x, X0)

    model.set_model_unet_function_wrapper(oracle)
    return model


def try_flow(suite: Any) -> dict[str, Any]:
    """LCM Sampler on a flow model: what it is fed; and what the other nodes say."""
    found: dict[str, Any] = {}
    fed: list[list[float]] = []
    model = tiny_sd3(fed)
    prompt = [[torch.zeros(1, 4, 32), {"pooled_output": torch.zeros(1, 64)}]]
    empty = torch.zeros(1, 16, 64, 64)
    image = torch.full_like(empty, model.model.process_latent_out(torch.tensor(X0)).item())
    noise = comfy.sample.prepare_noise(empty, 5)
    sampling = model.get_model_object("model_sampling")
    for steps in (1, 2, 4, 8):
        for name in ("lcm", "tcd"):
            for strength, latent in ((1.0, empty), (0.5, image)):
                fed.clear()
                sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", int(steps / strength))[-steps - 1 :]
                sampler = suite.run("LCMSampler", sampler=name)[0]
                out = comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, prompt, prompt, latent, seed=5)
                x0 = model.model.process_latent_in(out)
                known = X0 if latent is image else 0.0  # of what the first input holds
                wrong = [[mean - (1 - s) * (known if i == 0 else X0), std - s] for i, (s, mean, std) in enumerate(fed)]
                found[f"{name} {steps} {strength}"] = {
                    "calls": len(fed),
                    "wrong": max(abs(value) for pair in wrong for value in pair),
                    "x0": float((x0 - X0).abs().max()),
                }
    given = {"positive": prompt, "latent_image": {"samples": empty}}
    said = {
        "LCMApply": {},
        "LCMScheduler": {},
        "LCMKSampler": given,
        "LCMStepsGrid": {**given, "vae": None},
        "LCMTravel": {"positive_1": prompt, "latent_image": {"samples": empty}},
        "LCMDistiller": {},
    }
    found["said"] = {node: message_of(suite.run, node, model=model, **inputs) for node, inputs in said.items()}
    return found


def try_guidance(suite: Any) -> dict[str, Any]:
    """A full LCM through the host's own loader, and through its saver."""
    own = suite.load("full.safetensors")[0]
    stock = nodes.CheckpointLoaderSimple().load_checkpoint("full.safetensors")[0]
    found = {"stock info": suite.run("LCMApply", model=stock)[1]}
    wanted = suite.paint(own, guidance_scale=3.0)
    found["stock"] = float((suite.paint(stock, guidance_scale=3.0) - wanted).abs().max())
    lists = folder_paths.get_folder_paths("checkpoints")[0]
    applied = suite.run("LCMApply", model=own, guidance_scale=9.0)[0]
    for name, model in {"loaded": own, "applied": applied, "by stock": stock}.items():
        comfy.sd.save_checkpoint(f"{lists}/saved {name}.safetensors", model)
        for again, loader in {"": suite.load, "stock ": stock_loader}.items():
            paint = suite.paint(loader(f"saved {name}.safetensors")[0], guidance_scale=3.0)
            found[f"saved {name}, {again}loaded"] = float((paint - wanted).abs().max())
    found["scale"] = suite.run("LCMApply", model=suite.load("saved applied.safetensors")[0])[1]
    return found


def stock_loader(file: str) -> Any:
    """MODEL, and None for what the file lacks."""
    return comfy.sd.load_checkpoint_guess_config(
        folder_paths.get_full_path("checkpoints", file), output_vae=False, output_clip=False
    )


def try_stock_nodes(suite: Any) -> dict[str, Any]:
    """The host's KSampler with our names in its lists, and its own node for LCM before our sampler."""
    model = suite.load("cfg.safetensors")[0]
    applied = suite.run("LCMApply", model=model)[0]
    latent, conds = {"samples": suite.tensors["empty"]}, (suite.prompts["positive"], suite.prompts["negative"])
    found: dict[str, Any] = {}
    for name, own in {"lcm_suite": "lcm", "tcd_suite": "tcd"}.items():
        found[f"listed {name}"] = name in nodes.KSampler.INPUT_TYPES()["required"]["sampler_name"][0]
        painted = nodes.KSampler().sample(applied, 3, 4, 1.0, name, "lcm_grid", *conds, latent)[0]["samples"]
        expected = suite.paint(model, guidance_scale=1.0, sampler=own)
        found[name] = float((painted - expected).abs().max())
    [patched] = nodes_model_advanced.ModelSamplingDiscrete().patch(model, "lcm", False)
    sampler, sigmas = suite.run("LCMSampler")[0], suite.run("LCMScheduler", model=patched)[0]
    noise = comfy.sample.prepare_noise(latent["samples"], 3)
    arguments = (patched, noise, 1.0, sampler, sigmas, *conds, latent["samples"])
    found["kind"] = model.model.model_type.name
    found["behind the stock node"] = message_of(comfy.sample.sample_custom, *arguments, seed=3)
    found["too small"] = message_of(suite.paint, model, "tiny")
    return found
