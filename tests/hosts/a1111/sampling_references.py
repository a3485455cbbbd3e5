"""What the tests of the samplers share: lcm_core's pictures, diffusers' timesteps, and the plot's arguments."""

from __future__ import annotations

from functools import cache

from diffusers import LCMScheduler
from PIL import Image
from webui_harness import EMOJI, Painted, WebUI, to_base64

from lcm_core.pipeline import Pipeline

LORA = EMOJI / "lora" / "lcm_lora.safetensors"
PROMPT = "pizza, noto style"
NEGATIVE = "a face, twemoji style"


@cache
def pipeline(name: str, unet: str, lora: bool = False) -> Pipeline:
    return Pipeline.load(name, device="cpu", dtype="float32", unet=unet, lora=[(LORA, 1.0)] if lora else ())


def reference(model: Pipeline, **settings: object) -> Image.Image:
    return model(PROMPT, seed=1, width=64, height=64, **settings).images[0]  # type: ignore[arg-type]


def diffusers_timesteps(steps: int, strength: float = 1.0, original_steps: int = 50) -> list[int]:
    scheduler = LCMScheduler(original_inference_steps=original_steps)
    scheduler.set_timesteps(steps, strength=strength)
    return scheduler.timesteps.tolist()


def check(painted: Painted, sampler: str, timesteps: list[int], batch: int) -> None:
    assert painted.sampler == sampler
    assert painted.timesteps == timesteps
    assert painted.batches == [batch] * len(timesteps)


def drawing() -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("red", (16, 16, 48, 48))
    return picture


def left_half(picture: Image.Image) -> dict[str, object]:
    """Of a request that paints the left half of a picture anew."""
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (0, 0, picture.width // 2, picture.height))
    given = {"init_images": [to_base64(picture)], "mask": to_base64(mask)}
    return {**given, "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}


def check_listed_once(webui: WebUI) -> None:
    names = [sampler["name"] for sampler in webui.call("/sdapi/v1/samplers")]
    assert names.count("LCM Suite") == names.count("TCD Suite") == 1
    assert [schedule["label"] for schedule in webui.call("/sdapi/v1/schedulers")].count("LCM Skip") == 1


def elem_id(part: dict[str, dict[str, object]]) -> str:
    return str(part["props"].get("elem_id") or "")


def axes_of(webui: WebUI) -> list[str]:
    parts = webui.call("/config")["components"]
    drop = next(part for part in parts if elem_id(part).endswith("xyz_plot_x_type"))
    return [choice[0] if isinstance(choice, list) else choice for choice in drop["props"]["choices"]]


def plot_args(webui: WebUI, axes: dict[str, tuple[int, str]]) -> list[object]:
    """The plot's defaults from the web UI itself, with these axes."""
    scripts = webui.call("/sdapi/v1/script-info")
    plot = next(script for script in scripts if script["name"] == "x/y/z plot" and not script["is_img2img"])
    values: list[object] = [part["value"] for part in plot["args"]]
    for at, axis in enumerate("xyz"):
        kind, text = axes.get(axis, (0, ""))
        values[3 * at : 3 * at + 3] = [kind, text, []]
    labels = [part["label"] for part in plot["args"]]
    values[labels.index("Include Sub Images")] = True
    return values
