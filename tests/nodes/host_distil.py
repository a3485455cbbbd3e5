"""What host_run.py tries with LCM Distiller on tiny flow models of the host's own classes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import torch
from host_models import SIZES, empty, prompt, tiny
from safetensors.torch import load_file, save_file

import nodes

STEPS = 20


class Warnings(logging.Handler):
    """What the host logs as it loads a file: it names each key that it could not use."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.said.append(record.getMessage())


def inputs_of(family: str, name: str, **others: Any) -> dict[str, Any]:
    """A run of the distiller on random latents."""
    latents = torch.randn(empty(family, 8, 4).shape, generator=torch.Generator().manual_seed(2))
    options = {"batch_size": 4, "rank": 4, "learning_rate": 1e-2, "preview_every": STEPS, "w": 1.0, "seed": 1}
    given = {
        "latents": {"samples": latents},
        "positive": prompt(family, 1),
        "negative": prompt(family, 2, 5),
        "output_name": name,
    }
    return {"model": tiny(family), "steps": STEPS, **given, **options, **others}


def file_of(name: str) -> Path:
    """Where the distiller puts a LoRA."""
    return Path(folder_paths.get_folder_paths("loras")[0], f"{name}.safetensors")


def losses_of(name: str) -> list[float]:
    """Of all steps of a run."""
    log = Path(folder_paths.get_output_directory(), "lcm_suite", name, "log.jsonl")
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def interrupted(suite: Any, inputs: dict[str, Any]) -> None:
    """Press the button after half of the steps."""
    comfy.utils.set_progress_bar_global_hook(
        lambda value, *_, **__: comfy.model_management.interrupt_current_processing(value == STEPS // 2)
    )
    with contextlib.suppress(comfy.model_management.InterruptProcessingException):
        suite.run("LCMDistiller", **inputs)
    comfy.utils.set_progress_bar_global_hook(None)


def distil(suite: Any, family: str) -> dict[str, Any]:
    """A run at once and one that was interrupted; its LoRA in the stock loader."""
    name = f"of {family}"
    inputs = inputs_of(family, name)
    paint(suite, family, inputs["model"])
    before = {key: value.clone() for key, value in inputs["model"].model.state_dict().items()}
    told: list[str] = []
    sys.modules["suite.nodes.distiller"].say = lambda node, text, log=True: told.append(text)
    distilled, state, *_ = suite.run("LCMDistiller", **inputs)
    losses, tenth = losses_of(name), STEPS // 4
    again = {**inputs, "output_name": f"again {family}"}
    interrupted(suite, again)
    half = len(losses_of(f"again {family}"))
    suite.run("LCMDistiller", **again)
    both = load_file(file_of(name)), load_file(file_of(f"again {family}"))
    watch = Warnings()
    logging.getLogger().addHandler(watch)
    stock, _ = comfy.sd.load_lora_for_models(tiny(family), None, both[0], 1.0, 0.0)
    logging.getLogger().removeHandler(watch)
    after = inputs["model"].model.state_dict()
    unchanged = all(torch.equal(value, after[key]) for key, value in before.items())
    painted = [paint(suite, family, model) for model in (inputs["model"], stock, distilled)]
    file = file_of(name).name
    converted, _, saved = suite.run("LCMLoraConvert", model=tiny(family), lora_name=file, save_as=f"saved {family}")
    return {
        "told": told[0],
        "finite": all(map(math.isfinite, losses)),
        "falls": mean(losses[-tenth:]) / mean(losses[:tenth]),
        "half": half,
        "resumed": max(float((both[0][key] - both[1][key]).abs().max()) for key in both[0]),
        "left over": watch.said,
        "layers": len(stock.patches),
        "keys": len(state),
        "named": all(key.startswith("diffusion_model.") for key in state),
        "unchanged": unchanged,
        "moved": float((painted[1] - painted[0]).abs().max() / painted[0].abs().max()),
        "converted": float((paint(suite, family, converted) - painted[1]).abs().max()),
        "saved": sorted(load_file(file_of(saved.removesuffix(".safetensors")))) == sorted(both[0]),
        "same": float((painted[1] - painted[2]).abs().max() / painted[0].abs().max()),
    }


def paint(suite: Any, family: str, model: Any) -> torch.Tensor:
    """What LCM KSampler makes of an empty latent."""
    given = {"positive": prompt(family, 1), "latent_image": {"samples": empty(family, 8)}, "seed": 3}
    result: torch.Tensor = suite.run("LCMKSampler", model=model, **given)[0]["samples"]
    return result


def in_diffusers_names(suite: Any) -> dict[str, float]:
    """A LoRA of Flux under diffusers' names, of which several are one layer of the host: beside the stock loader."""
    model, generator = tiny("Flux"), torch.Generator().manual_seed(6)
    width = SIZES["Flux"]["hidden_size"]
    tensors = {}
    for layer in ("to_q", "to_k", "to_v"):
        key = f"transformer.single_transformer_blocks.0.attn.{layer}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(width, 4, generator=generator)
    save_file(tensors, file_of("diffusers"))
    stock, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    ours = suite.run("LCMLoraConvert", model=model, lora_name="diffusers.safetensors")[0]
    plain, theirs, own = (paint(suite, "Flux", each) for each in (model, stock, ours))
    return {"moved": float((plain - own).abs().max()), "apart": float((theirs - own).abs().max())}


def try_distil_families(suite: Any) -> dict[str, Any]:
    """All families by lcd, and one by every method."""
    found = {family: distil(suite, family) for family in SIZES}
    kinds = {}
    for method in ("tcd", "segmented", "dmd2", "finetune"):
        state = suite.run("LCMDistiller", **inputs_of("SD3", f"by {method}", steps=3, method=method))[1]
        moved = max(float(value.abs().max()) for key, value in state.items() if ".lora_up." in key)
        kinds[method] = {"losses": losses_of(f"by {method}"), "moved": moved}
    return {**found, "methods": kinds, "in diffusers names": in_diffusers_names(suite)}


def paint_emoji(model: Any, conds: Any, latent: dict[str, Any]) -> torch.Tensor:
    """What the stock KSampler makes of an empty latent."""
    painted: torch.Tensor = nodes.KSampler().sample(model, 3, 4, 1.0, "lcm", "simple", *conds, latent)[0]["samples"]
    return painted


def try_flow_teacher(suite: Any) -> dict[str, Any]:
    """The embedded teacher as a flow model beside itself, at the same noise levels; and what is distilled from it."""
    v_model, _, vae, _ = suite.load("cfg.safetensors")
    flow_model = nodes.CheckpointLoaderSimple().load_checkpoint("flow.safetensors")[0]
    conds, image = (suite.prompts["positive"], suite.prompts["negative"]), suite.tensors["image"]
    noise = comfy.sample.prepare_noise(image, 3)
    sigmas = v_model.get_model_object("model_sampling").sigmas[[900, 600, 300, 50]]
    samplers = {"lcm": suite.run("LCMSampler")[0], "euler": comfy.samplers.ksampler("euler")}

    def picture(model: Any, sampler: Any, levels: torch.Tensor) -> torch.Tensor:
        ending = torch.cat([levels, torch.zeros(1)])
        return vae.decode(comfy.sample.sample_custom(model, noise, 2.0, sampler, ending, *conds, image, seed=3))

    found: dict[str, Any] = {"info": suite.run("LCMApply", model=flow_model)[1]}
    for name, sampler in samplers.items():
        pictures = picture(v_model, sampler, sigmas), picture(flow_model, sampler, sigmas / (1 + sigmas))
        found[name] = float((pictures[0] - pictures[1]).abs().max())
    inputs = {"latents": {"samples": suite.tensors["training"]}, "output_name": "of a flow", "vae": vae, "steps": 4}
    options = {"batch_size": 2, "rank": 4, "learning_rate": 1e-3, "preview_every": 4, "w": 1.0}
    prompts = {"positive": conds[0], "negative": conds[1]}
    suite.run("LCMDistiller", model=flow_model, **inputs, **options, **prompts)
    watch = Warnings()
    logging.getLogger().addHandler(watch)
    stock, _ = comfy.sd.load_lora_for_models(flow_model, None, load_file(file_of("of a flow")), 1.0, 0.0)
    logging.getLogger().removeHandler(watch)
    latent = {"samples": suite.tensors["empty"]}
    painted = [paint_emoji(model, conds, latent) for model in (flow_model, stock)]
    found["moved"] = float((painted[1] - painted[0]).abs().max())
    found["left over"], found["losses"] = watch.said, losses_of("of a flow")
    comfy.sd.save_checkpoint(f"{folder_paths.get_folder_paths('checkpoints')[0]}/flow again.safetensors", flow_model)
    again = suite.load("flow again.safetensors")[0]
    size = painted[0].abs().max()
    found["saved"] = float((paint_emoji(again, conds, latent) - painted[0]).abs().max() / size)
    return found
