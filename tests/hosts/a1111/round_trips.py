"""Random settings, painted, pasted back from the infotext and painted again.

Before it is pasted, the web UI's own settings are changed, as if other pictures had been made in between. Setting
number N is the same in every run, so that one that fails can be looked at alone.
"""

from __future__ import annotations

import random
from typing import Any

from PIL import Image
from sampling_references import left_half
from webui_harness import Painted, WebUI, difference, to_base64

MODES = ("txt2img", "img2img", "hires", "inpaint")
PROMPTS = ("a slice of pizza, noto style", "a (green:1.3) pear, twemoji style", "[a fox:a cat:0.5] AND a face :0.4")
FIELDS = {
    "prompt": "prompt",
    "neg_prompt": "negative_prompt",
    "sampling": "sampler_name",
    "scheduler": "scheduler",
    "steps": "steps",
    "cfg_scale": "cfg_scale",
    "seed": "seed",
    "subseed": "subseed",
    "subseed_strength": "subseed_strength",
    "width": "width",
    "height": "height",
    "denoising_strength": "denoising_strength",
    "hr-checkbox": "enable_hr",
    "hr-visible-checkbox": "enable_hr",
    "hr_scale": "hr_scale",
    "hr_upscaler": "hr_upscaler",
    "hires_steps": "hr_second_pass_steps",
    "hr_cfg": "hr_cfg",
}
"""Name in a request for the id of each of the page's components, which begins with the tab's name."""


def random_settings(chance: random.Random, mode: str, lora: str, upscaler: str) -> dict[str, Any]:
    """One request, without its input pictures."""
    settings: dict[str, Any] = {
        "prompt": chance.choice(PROMPTS) + lora,
        "negative_prompt": chance.choice(["", "a face, noto style"]),
        "sampler_name": chance.choice(["LCM Suite", "TCD Suite"]),
        "scheduler": chance.choice(["Automatic", "LCM Skip", "Karras"]),
        "steps": chance.randint(1, 8),
        "cfg_scale": chance.choice([1, 1.5, 2, 4.5, 8]),
        "seed": chance.randrange(2**32),
        "subseed": chance.randrange(2**32),
        "subseed_strength": chance.choice([0, 0, 0.35, 1]),
        "width": chance.choice([64, 72, 96]),
        "height": chance.choice([64, 96]),
        "alwayson_scripts": {"LCM Suite": {"args": _args(chance)}},
        "override_settings": _options(chance),
    }
    if mode == "hires":
        settings |= {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": upscaler}
        settings |= {"hr_second_pass_steps": chance.choice([0, 2, 15])}
    if mode != "txt2img":
        settings["denoising_strength"] = chance.choice([0.01, 0.25, 0.5, 0.77, 1])
    return settings


def _args(chance: random.Random) -> list[Any]:
    return [chance.random() < 0.2, round(chance.random(), 2), chance.choice([8, 20, 50, 50, 100, 200])]


def _options(chance: random.Random) -> dict[str, Any]:
    """Of the host's own, those that change what our samplers paint."""
    return {
        "eta_noise_seed_delta": chance.choice([0, 0, 1, 31337]),
        "CLIP_stop_at_last_layers": chance.choice([1, 1, 2]),
        "sgm_noise_multiplier": chance.random() < 0.3,
        "s_min_uncond": chance.choice([0, 0, 3]),
        "s_min_uncond_all": chance.random() < 0.3,
        "skip_early_cond": chance.choice([0, 0, 0.4]),
        "initial_noise_multiplier": chance.choice([1, 1, 0.8]),
    }


DEFAULTS = {
    "eta_noise_seed_delta": 0,
    "CLIP_stop_at_last_layers": 1,
    "sgm_noise_multiplier": False,
    "s_min_uncond": 0,
    "s_min_uncond_all": False,
    "skip_early_cond": 0,
    "initial_noise_multiplier": 1,
}
"""Of `_options`, as all other tests expect them."""


def inputs(mode: str) -> dict[str, Any]:
    """What no infotext holds: pictures, and how the mask is to be read."""
    if mode not in ("img2img", "inpaint"):
        return {}
    picture = Image.new("RGB", (96, 96), "white")
    picture.paste("red", (16, 24, 70, 60))
    if mode == "inpaint":
        return left_half(picture) | {"mask_blur": 4}
    return {"init_images": [to_base64(picture)]}


def pasted(webui: WebUI, tab: str, infotext: str) -> dict[str, Any]:
    """The request that the page sends after this infotext was pasted into it."""
    filled = webui.call("/probe/paste", {"tab": tab, "infotext": infotext})
    values = {name.removeprefix(f"{tab}_"): value for name, value in filled["values"].items()}
    args = [values[f"script_{tab}_lcm_suite_lcm_suite_{name}"] for name in ("auto", "gamma", "original_steps")]
    return {
        **{FIELDS[name]: value for name, value in values.items() if name in FIELDS},
        "alwayson_scripts": {"LCM Suite": {"args": args}},
        "override_settings": filled["settings"],
    }


def paint_twice(webui: WebUI, number: int, lora: str) -> tuple[Painted, Painted]:
    chance = random.Random(number)
    mode = MODES[chance.randrange(len(MODES))]
    tab = "img2img" if mode in ("img2img", "inpaint") else "txt2img"
    settings = random_settings(chance, mode, lora, webui.upscaler)
    first = webui.paint(tab, **settings, **inputs(mode))
    webui.call("/sdapi/v1/options", _options(chance))
    try:
        return first, webui.paint(tab, **pasted(webui, tab, first.infotext), **inputs(mode))
    finally:
        webui.call("/sdapi/v1/options", DEFAULTS)


def comes_back(first: Painted, again: Painted) -> bool:
    return first.pictures[0].size == again.pictures[0].size and not difference(first.pictures[0], again.pictures[0])
