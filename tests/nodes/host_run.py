"""Runs inside a real ComfyUI's Python, without its server: executes nodes on what the test laid out in a folder.

Usage: python host_run.py CHECKOUT FOLDER. FOLDER holds models/ and tensors.safetensors (positive, negative, other, and
latents by name). With cases.json, a list of {"model": file, "node": id, "inputs": {...}, "latent": name}, it paints
those: results.safetensors, and in findings.json what the failed ones said. Without, it tries all else: findings.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from host_start import load_suite, start

FOLDER = Path(sys.argv[2])
start(Path(sys.argv[1]), FOLDER)

import comfy.sample  # noqa: E402
import torch  # noqa: E402
from host_control import try_control  # noqa: E402
from host_distil import try_distil_families, try_flow_teacher  # noqa: E402
from host_families import try_families  # noqa: E402
from host_loras import try_distiller, try_lora, try_stated  # noqa: E402
from host_patches import try_patches  # noqa: E402
from host_trials import apart, message_of, try_guidance, try_saved, try_stock_nodes, try_vae  # noqa: E402
from host_watch import functions, replaced  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


class Suite:
    """The nodes, and what they are tried on."""

    def __init__(self) -> None:
        self.host = functions()
        self.nodes, self.folder = load_suite(), FOLDER
        self.replaced = replaced(self.host)
        self.tensors = load_file(FOLDER / "tensors.safetensors")
        self.prompts = {name: [[self.tensors.pop(name), {}]] for name in ("positive", "negative", "other")}
        self.models: dict[str, Any] = {}

    def run(self, node: str, **inputs: Any) -> Any:
        """Execute a node as ComfyUI does."""
        return self.nodes[node].EXECUTE_NORMALIZED(**inputs).args

    def load(self, file: str) -> Any:
        """MODEL, CLIP, VAE, info."""
        if file not in self.models:
            self.models[file] = self.run("LCMCheckpointLoader", ckpt_name=file)
        return self.models[file]

    def paint(self, model: Any, latent: str = "empty", **inputs: Any) -> torch.Tensor:
        """What the LCM KSampler makes of a latent."""
        given = {"positive": self.prompts["positive"], "negative": self.prompts["negative"], "seed": 3} | inputs
        latent_image = {"samples": self.tensors[latent]}
        return self.run("LCMKSampler", model=model, latent_image=latent_image, **given)[0]["samples"]


def paint_cases(suite: Suite) -> dict[str, str]:
    """Paint every case; returns what the failed ones said."""
    results: dict[str, torch.Tensor] = {}
    messages: dict[str, str] = {}
    for number, case in enumerate(json.loads((FOLDER / "cases.json").read_text())):
        inputs = case["inputs"] | {"seed": case["seed"]}
        try:
            results[str(number)] = suite.paint(suite.load(case["model"])[0], case["latent"], **inputs).contiguous()
        except ValueError as error:
            messages[str(number)] = str(error)
    save_file(results, FOLDER / "results.safetensors")
    return messages


def try_sampling(suite: Suite) -> dict[str, Any]:
    """LCM Apply, LCM Scheduler and LCM Sampler with the host's own sampling, beside the LCM KSampler."""
    model = suite.load("full.safetensors")[0]
    latent, noise = suite.tensors["empty"], comfy.sample.prepare_noise(suite.tensors["empty"], 3)
    conds = suite.prompts["positive"], suite.prompts["negative"]
    applied, info = suite.run("LCMApply", model=model, guidance_scale=3.0)
    twice, _ = suite.run(
        "LCMApply", model=suite.run("LCMApply", model=model, guidance_scale=9.0)[0], guidance_scale=3.0
    )
    sigmas = suite.run("LCMScheduler", model=applied, steps=4)[0]
    found: dict[str, Any] = {
        "info": info,
        "plain info": suite.run("LCMApply", model=suite.load("cfg.safetensors")[0])[1],
    }
    for name in ("lcm", "tcd"):
        sampler = suite.run("LCMSampler", sampler=name)[0]
        custom = [
            comfy.sample.sample_custom(patched, noise, 1.0, sampler, sigmas, *conds, latent, seed=3)
            for patched in (applied, twice)
        ]
        own = suite.paint(model, guidance_scale=3.0, sampler=name)
        found[f"custom {name}"] = apart(custom[0], own)
        found[f"applied twice {name}"] = apart(custom[1], own)
    stock = comfy.sample.sample(applied, noise, 1, 1.0, "lcm", "simple", *conds, latent, seed=3)
    found["stock ksampler, 1 step"] = apart(stock, suite.paint(model, guidance_scale=3.0, steps=1))
    both = suite.paint(model, "empty two", guidance_scale=3.0)
    alone = [suite.paint(model, guidance_scale=3.0, seed=seed) for seed in (3, 4)]
    found["batch"] = apart(both, torch.cat(alone))
    return found


def try_grid(suite: Suite) -> dict[str, Any]:
    """A steps grid beside the LCM KSampler's pictures."""
    model, _, vae, _ = suite.load("full.safetensors")
    sheet, images = suite.run(
        "LCMStepsGrid",
        model=model,
        positive=suite.prompts["positive"],
        latent_image={"samples": suite.tensors["empty two"]},
        vae=vae,
        seed=3,
        steps="1, 2",
        guidance_scales="3, 5",
    )
    alone = [suite.paint(model, steps=steps, guidance_scale=scale) for scale in (3.0, 5.0) for steps in (1, 2)]
    return {
        "sheet": list(sheet.shape),
        "images": list(images.shape),
        "apart": apart(images, torch.cat([vae.decode(latents) for latents in alone])),
    }


def try_travel(suite: Suite) -> dict[str, Any]:
    """The end frames of an animation beside the single pictures."""
    model = suite.load("full.safetensors")[0]
    prompts = suite.prompts["positive"], suite.prompts["other"]
    ends = [suite.paint(model, guidance_scale=3.0, seed=seed, positive=prompts[i]) for i, seed in enumerate((3, 8))]
    frames = suite.run(
        "LCMTravel",
        model=model,
        positive_1=prompts[0],
        positive_2=prompts[1],
        latent_image={"samples": suite.tensors["empty"]},
        seeds="3, 8",
        frames=5,
        guidance_scale=3.0,
    )[0]["samples"]
    jumps = (frames[1:] - frames[:-1]).flatten(1).norm(dim=1)
    return {
        "frames": len(frames),
        "ends": [apart(frames[:1], ends[0]), apart(frames[-1:], ends[1])],
        "smallest jump": float(jumps.min()),
        "whole way": float((ends[1] - ends[0]).norm()),
    }


def try_bad_input(suite: Suite) -> dict[str, str]:
    """What the nodes say to input that cannot work."""
    full, plain = suite.load("full.safetensors")[0], suite.load("cfg.safetensors")[0]
    travel = {
        "model": full,
        "positive_1": suite.prompts["positive"],
        "latent_image": {"samples": suite.tensors["empty"]},
    }
    return {
        "channels": message_of(suite.paint, full, "sixteen channels"),
        "video": message_of(suite.paint, full, "video"),
        "strength": message_of(suite.paint, full, strength=0.5),
        "steps": message_of(suite.paint, full, "image", steps=8, strength=0.1),
        "negative": message_of(suite.paint, plain, guidance_scale=2.0, negative=None),
        "timesteps": message_of(suite.paint, full, timesteps="999, x"),
        "frames": message_of(suite.run, "LCMTravel", frames=0, **travel),
        "lora": message_of(suite.run, "LCMLoraConvert", model=plain, lora_name="wide.safetensors"),
        "full": message_of(suite.run, "LCMDistiller", model=full),
        "nothing": message_of(suite.run, "LCMDistiller", model=plain),
        "broken": message_of(suite.run, "LCMCheckpointLoader", ckpt_name="broken.safetensors"),
    }


def main() -> None:
    """Do what the folder asks for."""
    suite = Suite()
    if (FOLDER / "cases.json").exists():
        findings: dict[str, Any] = paint_cases(suite)
    else:
        trials = (try_sampling, try_grid, try_travel, try_bad_input, try_lora, try_distiller, try_stated)
        trials += (try_families, try_distil_families, try_flow_teacher, try_guidance, try_saved, try_stock_nodes)
        trials += (try_patches, try_vae, try_control)
        findings = {trial.__name__.removeprefix("try_"): trial(suite) for trial in trials}
        findings["replaced"] = {"at the start": suite.replaced, "at the end": replaced(suite.host)}
    (FOLDER / "findings.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    with torch.inference_mode():  # as ComfyUI executes nodes
        main()
