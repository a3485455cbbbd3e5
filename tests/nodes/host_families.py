"""What host_run.py tries on the tiny flow models of host_models.py."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import torch
from host_models import CONFIGS, SIZES, empty, prompt, tiny
from host_trials import message_of
from torch import Tensor

import nodes

X0, IMAGE = 2.0, -1.0
"""What the oracle answers, and what the picture that is painted over holds, everywhere."""
STEPS, STRENGTHS = (1, 2, 4, 8), (0.3, 0.5, 0.75, 1.0)


def with_oracle(model: Any, record: Callable[[float, Tensor], object]) -> Any:
    """A clone that knows x0; `record` is given s and each input. The real network must take the first one."""
    clone = model.clone()
    seen: list[bool] = []

    def oracle(apply: Any, given: dict[str, Any]) -> Tensor:
        x = given["input"]
        assert seen or apply(x, given["timestep"], **given["c"]).shape == x.shape
        seen.append(True)
        record(float(given["timestep"][0]), x)
        return torch.full_like(x, X0)

    clone.set_model_unet_function_wrapper(oracle)
    return clone


def fed_to(suite: Any, family: str, model: Any) -> dict[str, Any]:
    """What LCM KSampler feeds the network, and gives: how far means are from those that they must have, and, relative
    to those, spreads and x0."""
    blank = empty(family, 64)
    pictures = {value: model.model.process_latent_out(torch.full_like(blank, value)) for value in (X0, IMAGE)}
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    cases: dict[str, dict[str, Any]] = {f"{n} steps": {"steps": n} for n in STEPS}
    cases |= {f"strength {strength}": {"steps": 4, "strength": strength} for strength in STRENGTHS}
    cases["mask"] = {"steps": 4, "noise_mask": mask}
    found = {}
    for sampler, (name, case) in product(("lcm", "tcd"), cases.items()):
        kept = "noise_mask" in case
        # tcd takes what differs from x0 for noise, and leads it on
        start = IMAGE if kept or sampler == "lcm" else X0
        latent = {"samples": pictures[start] if kept or "strength" in case else blank}
        start = 0.0 if latent["samples"] is blank else start
        latent |= {"noise_mask": mask} if kept else {}
        inputs: list[tuple[float, Tensor]] = []
        oracle = with_oracle(model, lambda s, x, inputs=inputs: inputs.append((s, x)))
        settings = {"steps": case["steps"], "strength": case.get("strength", 1.0), "sampler": sampler, "seed": 5}
        out = suite.run("LCMKSampler", model=oracle, positive=prompt(family, 1), latent_image=latent, **settings)[0]
        x0 = model.model.process_latent_in(out["samples"])
        means, spreads = [], []
        for i, (s, x) in enumerate(inputs):
            halves = {0: IMAGE, 1: X0} if kept and i else dict.fromkeys((0, 1), X0 if i else start)
            for half, mean in halves.items():
                part = x.chunk(2, -1)[half]
                means.append(abs(float(part.mean()) - (1 - s) * mean))
                spreads.append(abs(float(part.std()) / s - 1))
        left = IMAGE if kept else X0
        found[f"{sampler} {name}"] = {
            "calls": len(inputs),
            "steps": case["steps"],
            "first": inputs[0][0],
            "expected first": shifted(model, settings["strength"]),
            "mean": max(means),
            "spread": max(spreads),
            "x0": max(float((x0.chunk(2, -1)[half] / aim - 1).abs().max()) for half, aim in ((0, left), (1, X0))),
        }
    return found


def shifted(model: Any, u: float) -> float:
    """s of an even u, by the host's own word for it."""
    return float(model.get_model_object("model_sampling").percent_to_sigma(1 - u))


def beside_the_stock_nodes(suite: Any, family: str, model: Any) -> dict[str, Any]:
    """The real network through LCM KSampler, and through all other ways."""
    latent, conds = empty(family, 8), (prompt(family, 1), prompt(family, 2))
    noise = comfy.sample.prepare_noise(latent, 3)
    run = {"model": model, "positive": conds[0], "latent_image": {"samples": latent}, "seed": 3}
    painted = {name: suite.run("LCMKSampler", sampler=name, **run)[0]["samples"] for name in ("lcm", "tcd")}
    size = float(painted["lcm"].abs().max())
    sigmas = suite.run("LCMScheduler", model=model, steps=4)[0]
    applied, info = suite.run("LCMApply", model=model)

    def custom(sampler: Any) -> Tensor:
        return comfy.sample.sample_custom(applied, noise, 1.0, sampler, sigmas, *conds, latent, seed=3)

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max()) / size

    def same_noise() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(7)
        return {"noise_sampler": lambda *_: torch.randn(latent.shape, generator=generator)}

    samplers = {name: suite.run("LCMSampler", sampler=name)[0] for name in painted}
    stock = comfy.samplers.KSAMPLER(comfy.k_diffusion.sampling.sample_lcm, same_noise())
    ours = suite.run("LCMSampler")[0]
    ours.extra_options |= same_noise()
    in_lists = nodes.KSampler().sample(applied, 3, 4, 1.0, "lcm_suite", "lcm_grid", *conds, {"samples": latent})
    frames = suite.run(
        "LCMTravel",
        model=model,
        positive_1=conds[0],
        positive_2=prompt(family, 2, 5),
        latent_image={"samples": latent},
        seeds="3, 8",
        frames=3,
    )[0]["samples"]
    last = suite.run("LCMKSampler", **run | {"positive": prompt(family, 2, 5), "seed": 8})[0]["samples"]
    _, images = suite.run("LCMStepsGrid", vae=Vae(), steps="1, 2", **run)
    between = suite.run("LCMLatentInterpolator", latent_1={"samples": frames}, frames=5)[0]["samples"]
    return {
        "stock lcm": apart(custom(ours), custom(stock)),
        **{f"custom {name}": apart(custom(sampler), painted[name]) for name, sampler in samplers.items()},
        "stock ksampler": apart(in_lists[0]["samples"], painted["lcm"]),
        "travel": [apart(frames[:1], painted["lcm"]), apart(frames[-1:], last)],
        "grid": list(images.shape),
        "between": list(between.shape),
        "shape": [5, *latent.shape[1:]],
        "info": info,
        "config": CONFIGS[family].__name__,
        "shift": shifted(model, 0.5) / (1 - shifted(model, 0.5)),
    }


class Vae:
    """Stands in for a VAE: frames of a video side by side in one dimension more, as the host's VAEs give them."""

    def decode(self, samples: Tensor) -> Tensor:
        """(B, h, w, 3), of videos (B, T, h, w, 3)."""
        return samples[:, :3].movedim(1, -1).sigmoid()


def refused(suite: Any) -> dict[str, dict[str, str]]:
    """What all nodes say to processes that LCM does not know."""
    kinds = {
        "EDM": (comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EDM),
        "Cascade": (comfy.model_sampling.StableCascadeSampling, comfy.model_sampling.EPS),
        "V_PREDICTION": (comfy.model_sampling.ModelSamplingContinuousV, comfy.model_sampling.V_PREDICTION),
    }
    latent = {"samples": empty("SD3", 8)}
    of_prompt = {"positive": prompt("SD3", 1), "latent_image": latent}
    inputs: dict[str, dict[str, Any]] = {
        "LCMApply": {},
        "LCMScheduler": {},
        "LCMKSampler": of_prompt,
        "LCMStepsGrid": {**of_prompt, "vae": None},
        "LCMTravel": {"positive_1": prompt("SD3", 1), "latent_image": latent},
        "LCMDistiller": {},
    }
    found = {}
    for name, bases in kinds.items():
        model = tiny("SD3")
        model.add_object_patch("model_sampling", type("ModelSampling", bases, {})(None))
        said = {node: message_of(suite.run, node, model=model, **given) for node, given in inputs.items()}
        sampler, noise = suite.run("LCMSampler")[0], torch.randn(1, 16, 8, 8)
        arguments = (
            model,
            noise,
            1.0,
            sampler,
            torch.tensor([1.0, 0.0]),
            prompt("SD3", 1),
            prompt("SD3", 2),
            latent["samples"],
        )
        found[name] = said | {"LCMSampler": message_of(comfy.sample.sample_custom, *arguments, seed=3)}
    return found


def try_families(suite: Any) -> dict[str, Any]:
    """All five families, and what is refused."""
    found: dict[str, Any] = {"refused": refused(suite)}
    for family in SIZES:
        model = tiny(family)
        found[family] = {"fed": fed_to(suite, family, model), **beside_the_stock_nodes(suite, family, model)}
    return found
