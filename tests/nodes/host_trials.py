"""What host_run.py tries beyond the suite's own sampling: the host's own loaders, savers and lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import folder_paths
import torch
from comfy_extras import nodes_model_advanced, nodes_model_merging

import nodes


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max())


def message_of(function: Any, *args: Any, **kwargs: Any) -> str:
    """What a call that must fail says."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


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


def try_saved(suite: Any) -> dict[str, str]:
    """What a checkpoint and a LoRA's say of their sampling, after the host has saved the MODELs and they came back."""
    lists = folder_paths.get_folder_paths("checkpoints")[0]
    plain = suite.load("cfg.safetensors")[0]
    with_lora = suite.run("LCMLoraConvert", model=plain, lora_name="phased.safetensors")[0]
    full = suite.run("LCMLoraConvert", model=suite.load("full.safetensors")[0], lora_name="phased.safetensors")[0]
    models = {"stated": suite.load("phased.safetensors")[0], "with lora": with_lora, "full": full, "plain": plain}
    found = {}
    for name, model in models.items():
        comfy.sd.save_checkpoint(f"{lists}/again {name}.safetensors", model)
        found[name] = suite.load(f"again {name}.safetensors")[3]
    return found


def try_vae(suite: Any) -> dict[str, Any]:
    """What the stock loader takes for the embedded model's VAE, and beside it what the stock nodes save of ours."""
    model, clip, own, _ = suite.load("full.safetensors")
    stock, vaes = nodes.CheckpointLoaderSimple().load_checkpoint("full.safetensors")[2], {}
    lists = {name: Path(folder_paths.get_folder_paths(name)[0]) for name in ("vae", "checkpoints")}
    nodes_model_merging.VAESave().save(own, "own")
    [file] = Path(folder_paths.get_output_directory()).glob("own_*.safetensors")
    lists["vae"].mkdir(exist_ok=True)
    file.rename(lists["vae"] / "own.safetensors")
    vaes["file of its own"] = nodes.VAELoader().load_vae("own.safetensors")[0]
    comfy.sd.save_checkpoint(str(lists["checkpoints"] / "with vae.safetensors"), model, clip, own)
    vaes["saved"] = nodes.CheckpointLoaderSimple().load_checkpoint("with vae.safetensors")[2]
    vaes["saved, by our loader"] = suite.load("with vae.safetensors")[2]
    latents = suite.tensors["image"] / 4
    image = stock.decode(latents)
    encoded = stock.encode(image)
    found: dict[str, Any] = {"kind": type(stock.first_stage_model).__name__}
    for name, vae in vaes.items():
        found[f"decoded, {name}"] = apart(vae.decode(latents), image)
        found[f"encoded, {name}"] = apart(vae.encode(image), encoded)
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
    found["small"] = {name: message_of(suite.paint, model, name) for name in ("smallest", "narrow")}
    return found
