"""What host_run.py tries with LoRA files: given ones, ones that state their sampling, and ones that it makes itself."""

from __future__ import annotations

import json
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from host_trials import apart, message_of
from safetensors.torch import load_file


def try_stated(suite: Any) -> dict[str, Any]:
    """A checkpoint, a LoRA and a new student whose files state how they want to be sampled."""
    phased, _, vae, info = suite.load("phased.safetensors")
    plain = suite.load("cfg.safetensors")[0]
    with_lora, _, saved = suite.run("LCMLoraConvert", model=plain, lora_name="phased.safetensors", save_as="phased too")
    again = suite.run("LCMLoraConvert", model=plain, lora_name=saved)[0]
    wanted = {"sampler": "tcd", "gamma": 0.0, "original_steps": 10}
    student, previews = learn_tcd(suite, plain, vae)
    own = {"seed": 0, "guidance_scale": 1.0}
    return {
        "info": info,
        "lora info": [suite.run("LCMApply", model=model)[1] for model in (with_lora, again)],
        "auto": [apart(suite.paint(model), suite.paint(model, **wanted)) for model in (phased, with_lora, again)],
        "other grid": apart(suite.paint(phased), suite.paint(phased, **wanted | {"original_steps": 50})),
        "lcm": apart(suite.paint(phased), suite.paint(phased, sampler="lcm")),
        "nothing stated": apart(suite.paint(plain), suite.paint(plain, sampler="lcm")),
        "student": suite.run("LCMApply", model=student)[1],
        "preview": apart(previews[-1:], vae.decode(suite.paint(student, **own))),
        "preview by lcm": apart(previews[-1:], vae.decode(suite.paint(student, sampler="lcm", **own))),
    }


def learn_tcd(suite: Any, model: Any, vae: Any) -> tuple[Any, Any]:
    """A student of two steps by tcd, and its previews."""
    inputs = {"latents": {"samples": suite.tensors["training"]}, "vae": vae, "method": "tcd", "output_name": "curve"}
    prompts = {name: suite.prompts[name] for name in ("positive", "negative")}
    options = {"steps": 2, "batch_size": 2, "rank": 4, "w": 1.0, "preview_every": 2}
    student, _, _, previews, _ = suite.run("LCMDistiller", model=model, **inputs, **prompts, **options)
    return student, previews


def try_lora(suite: Any) -> dict[str, Any]:
    """A LoRA in peft's layout onto a model, and into a file."""
    plain = suite.load("cfg.safetensors")[0]
    model, _, name = suite.run("LCMLoraConvert", model=plain, lora_name="peft.safetensors", save_as="converted")
    again = suite.run("LCMLoraConvert", model=plain, lora_name=name)[0]
    before, after = suite.paint(plain), suite.paint(model)
    return {
        "layers": len(model.patches),
        "moved": apart(before, after),
        "again": apart(after, suite.paint(again)),
        "name": name,
    }


def try_distiller(suite: Any) -> dict[str, Any]:
    """A run that is interrupted, continued and used; what it leaves of the MODEL that it was given."""
    model, _, vae, _ = suite.load("cfg.safetensors")
    comfy.model_management.unload_all_models()  # puts back what earlier trials merged into its weights
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    inputs = {
        "model": model,
        "vae": vae,
        "latents": {"samples": suite.tensors["training"]},
        "positive": suite.prompts["positive"],
        "negative": suite.prompts["negative"],
        "output_name": "learnt",
        "batch_size": 2,
        "rank": 4,
        "learning_rate": 1e-3,
        "preview_every": 2,
        "w": 1.0,
    }
    file = suite.folder / "models" / "loras" / "learnt.safetensors"
    # The host tells its page of each step through this; a user who presses the button after the second one:
    comfy.utils.set_progress_bar_global_hook(
        lambda value, *_, **__: comfy.model_management.interrupt_current_processing(value == 2)
    )
    interrupted = ""
    try:
        suite.run("LCMDistiller", steps=4, **inputs)
    except comfy.model_management.InterruptProcessingException:
        interrupted = "kept" if file.exists() else "lost"
    comfy.utils.set_progress_bar_global_hook(None)
    log = suite.folder / "output" / "lcm_suite" / "learnt" / "log.jsonl"
    first = len(log.read_text().splitlines())
    distilled, state, name, previews, loss = suite.run("LCMDistiller", steps=4, **inputs)
    other = {"seed": 7, "learning_rate": 2e-3}
    asked = message_of(suite.run, "LCMDistiller", steps=4, **inputs | other)
    after = model.model.state_dict()
    stock = comfy.sd.load_lora_for_models(model, None, load_file(file), 1.0, 0.0)[0]
    return {
        "interrupted": interrupted,
        "steps": [first, *(json.loads(line)["step"] for line in log.read_text().splitlines())],
        "unchanged": all(torch.equal(value, after[name]) for name, value in before.items()),
        "name": name,
        "keys": sorted(state),
        "layers": len(distilled.patches),
        "moved": apart(suite.paint(model), suite.paint(distilled)),
        "stock loader": apart(suite.paint(stock), suite.paint(distilled)),
        "previews": list(previews.shape),
        "preview": apart(previews[-1:], vae.decode(suite.paint(distilled, seed=0, guidance_scale=1.0))),
        "loss": list(loss.shape),
        "asked": asked,
        "changed": message_of(suite.run, "LCMDistiller", steps=4, **inputs | {"rank": 2}),
    }
