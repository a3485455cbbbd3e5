"""The samplers in the real web UI: what the U-Net is asked, and the picture, against diffusers and lcm_core."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from diffusers import LCMScheduler
from PIL import Image
from webui_harness import EMOJI, HttpError, Painted, WebUI, difference, to_base64

from lcm_core.pipeline import Pipeline

pytestmark = pytest.mark.host
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


def test_samplers_and_schedule_listed_once(webui: WebUI) -> None:
    names = [sampler["name"] for sampler in webui.call("/sdapi/v1/samplers")]
    assert names.count("LCM Suite") == names.count("TCD Suite") == 1
    assert [schedule["label"] for schedule in webui.call("/sdapi/v1/schedulers")].count("LCM Skip") == 1


@pytest.mark.parametrize("steps", range(1, 9))
def test_full_lcm_on_the_papers_grid(webui: WebUI, steps: int) -> None:
    """Grid, no negative pass, and the picture, for all usual step counts."""
    webui.load("emoji_lcm")
    painted = webui.paint(sampler_name="LCM Suite", steps=steps, cfg_scale=2)
    check(painted, "LCM Suite", diffusers_timesteps(steps), 1)
    wanted = reference(pipeline("emoji", "lcm"), num_inference_steps=steps, guidance_scale=2.0, sampler="lcm")
    assert difference(painted.pictures[0], wanted) <= 1


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 5.0, 9.0])
def test_cfg_slider_is_the_guidance_embedding_of_a_full_lcm(webui: WebUI, guidance_scale: float) -> None:
    """w = 0, 2, 4, 8; the negative prompt, which the model does not know, costs nothing."""
    webui.load("emoji_lcm")
    painted = webui.paint(sampler_name="LCM Suite", cfg_scale=guidance_scale, negative_prompt=NEGATIVE)
    check(painted, "LCM Suite", diffusers_timesteps(4), 1)
    wanted = reference(pipeline("emoji", "lcm"), guidance_scale=guidance_scale, sampler="lcm")
    assert difference(painted.pictures[0], wanted) <= 1


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_with_gamma(webui: WebUI, gamma: float) -> None:
    webui.load("emoji_lcm")
    painted = webui.paint(
        sampler_name="TCD Suite", cfg_scale=2, alwayson_scripts={"LCM Suite": {"args": [False, gamma]}}
    )
    check(painted, "TCD Suite", diffusers_timesteps(4), 1)
    assert f"TCD gamma: {gamma:g}" in painted.infotext.replace(".0,", ",")
    wanted = reference(pipeline("emoji", "lcm"), guidance_scale=2.0, sampler="tcd", gamma=gamma)
    assert difference(painted.pictures[0], wanted) <= 1


@pytest.mark.parametrize(("guidance_scale", "batch"), [(1.0, 1), (1.5, 2)])
def test_lora_with_and_without_negative_pass(webui: WebUI, guidance_scale: float, batch: int) -> None:
    """CFG 1 runs one row, more runs two, and both are lcm_core's picture."""
    webui.load("emoji_teacher")
    painted = webui.paint(
        prompt=f"{PROMPT}<lora:emoji_lcm_lora:1>",
        negative_prompt=NEGATIVE,
        sampler_name="LCM Suite",
        cfg_scale=guidance_scale,
    )
    check(painted, "LCM Suite", diffusers_timesteps(4), batch)
    wanted = reference(
        pipeline("emoji", "teacher", True), guidance_scale=guidance_scale, sampler="lcm", negative_prompt=NEGATIVE
    )
    assert difference(painted.pictures[0], wanted) <= 1


def test_other_prediction_type(webui: WebUI) -> None:
    """epsilon where the embedded model predicts v, v where it predicts epsilon."""
    webui.load("other_lcm")
    painted = webui.paint(sampler_name="LCM Suite", cfg_scale=2)
    wanted = reference(pipeline(str(webui.data / "other"), "lcm"), guidance_scale=2.0, sampler="lcm")
    assert difference(painted.pictures[0], wanted) <= 1


def test_batch_is_its_pictures_alone(webui: WebUI) -> None:
    """Every picture's noise comes from its own seed, whatever is painted beside it."""
    webui.load("emoji_lcm")
    both = webui.paint(sampler_name="LCM Suite", cfg_scale=2, batch_size=2)
    second = webui.paint(sampler_name="LCM Suite", cfg_scale=2, seed=2)
    assert both.batches == [2] * 4
    pictures = both.pictures[-2:]
    assert difference(pictures[1], second.pictures[0]) <= 1


def test_prompt_longer_than_the_negative_runs_one_row(webui: WebUI) -> None:
    """With prompts of unequal length the host asks for positive and negative rows one after the other."""
    webui.load("emoji_teacher")
    painted = webui.paint(prompt="pizza " * 90, sampler_name="LCM Suite")
    assert painted.batches == [1] * 4


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.75, 1.0])
def test_image_to_image_runs_all_steps_at_exact_strength(webui: WebUI, strength: float) -> None:
    webui.load("emoji_lcm")
    painted = webui.paint(
        "img2img",
        sampler_name="LCM Suite",
        cfg_scale=2,
        denoising_strength=strength,
        init_images=[to_base64(drawing())],
    )
    check(painted, "LCM Suite", diffusers_timesteps(4, strength), 1)


def test_inpainting_keeps_the_rest(webui: WebUI) -> None:
    webui.load("emoji_lcm")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    painted = webui.paint(
        "img2img",
        sampler_name="LCM Suite",
        cfg_scale=2,
        denoising_strength=0.8,
        init_images=[to_base64(drawing())],
        mask=to_base64(mask),
        mask_blur=0,
        inpainting_fill=1,
        inpaint_full_res=False,
    )
    check(painted, "LCM Suite", diffusers_timesteps(4, 0.8), 1)
    kept = (40, 0, 64, 64)
    assert difference(painted.pictures[0].crop(kept), drawing().crop(kept)) <= 1
    assert difference(painted.pictures[0].crop((0, 0, 32, 64)), drawing().crop((0, 0, 32, 64))) > 50


def test_hires(webui: WebUI) -> None:
    """Both passes on their grids, with guidance."""
    webui.load("emoji_lcm")
    forge = {"hr_cfg": 2} if webui.is_forge else {}
    painted = webui.paint(
        sampler_name="LCM Suite",
        cfg_scale=2,
        enable_hr=True,
        hr_scale=2,
        hr_upscaler=webui.upscaler,
        hr_second_pass_steps=2,
        denoising_strength=0.5,
        **forge,
    )
    check(painted, "LCM Suite", diffusers_timesteps(4) + diffusers_timesteps(2, 0.5), 1)
    assert painted.pictures[0].size == (128, 128)


def test_schedule_repairs_the_built_in_lcm(webui: WebUI) -> None:
    webui.load("emoji_teacher")
    wrong = webui.paint(sampler_name="LCM")
    right = webui.paint(sampler_name="LCM", scheduler="LCM Skip")
    assert right.sampler == "LCM"
    assert "Schedule type: LCM Skip" in right.infotext
    assert right.timesteps == diffusers_timesteps(4) != wrong.timesteps


def test_original_steps(webui: WebUI) -> None:
    webui.load("emoji_lcm")
    painted = webui.paint(
        sampler_name="LCM Suite", cfg_scale=2, alwayson_scripts={"LCM Suite": {"args": [False, 0.3, 100]}}
    )
    scheduler = LCMScheduler(original_inference_steps=100)
    scheduler.set_timesteps(4)
    check(painted, "LCM Suite", scheduler.timesteps.tolist(), 1)
    assert "LCM original steps: 100" in painted.infotext


def test_noise_seed_delta_is_in_the_infotext(webui: WebUI) -> None:
    webui.load("emoji_lcm")
    delta = {"override_settings": {"eta_noise_seed_delta": 31337}}
    plain, moved = webui.paint(sampler_name="LCM Suite"), webui.paint(sampler_name="LCM Suite", **delta)
    assert "ENSD: 31337" in moved.infotext
    assert "ENSD" not in plain.infotext
    assert difference(plain.pictures[0], moved.pictures[0]) > 0


def test_more_steps_than_a_strength_leaves_are_reduced_and_said(webui: WebUI) -> None:
    """In image to image, in the second pass of hires fix, and at hardly any strength: a picture and a comment."""
    webui.load("emoji_lcm")
    given = {"sampler_name": "LCM Suite", "cfg_scale": 2, "init_images": [to_base64(drawing())]}
    painted = webui.paint("img2img", **given, steps=20, denoising_strength=0.3)
    assert painted.timesteps == diffusers_timesteps(15, 0.3)
    assert "20 steps are more than the grid has at strength 0.3; 15 were taken" in painted.said
    painted = webui.paint("img2img", **given, denoising_strength=0.01)
    assert painted.timesteps == [19]
    assert "strength 0.01 is below the lowest step of the grid; 0.02 was taken" in painted.said
    assert len(webui.paint(sampler_name="LCM Suite", cfg_scale=2, steps=60).calls) == 50
    hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": webui.upscaler, "hr_second_pass_steps": 20}
    for sampler, schedule, calls in (("LCM Suite", "Automatic", 15), ("Euler", "LCM Skip", 20)):
        settings = {"sampler_name": sampler, "scheduler": schedule, "cfg_scale": 2, "denoising_strength": 0.3, **hires}
        assert len(webui.paint(**settings).calls) == 4 + calls


def test_what_does_not_suit_the_models_is_said(webui: WebUI) -> None:
    webui.load("emoji_teacher")
    usual = {"sampler_name": "LCM Suite", "steps": 20, "cfg_scale": 7}
    assert "LCM Suite, 4 steps, CFG 1 would suit it" in webui.paint(prompt="a <lora:emoji_lcm_lora:1>", **usual).said
    assert "emoji_teacher is no LCM and no LCM-LoRA is in the prompt" in webui.paint(sampler_name="LCM Suite").said
    refined = {"refiner_checkpoint": "emoji_lcm", "refiner_switch_at": 0.5}
    assert "emoji_lcm is a full LCM and emoji_teacher is none" in webui.paint(sampler_name="LCM Suite", **refined).said
    webui.load("emoji_lcm")
    full = {"sampler_name": "LCM Suite", "cfg_scale": 2}
    assert "reads no negative prompt" in webui.paint(**full, negative_prompt=NEGATIVE).said
    assert "LCM Suite:" not in webui.paint(**full).said


def test_auto_sets_what_a_lora_wants(webui: WebUI) -> None:
    webui.load("emoji_teacher")
    auto = {"LCM Suite": {"args": [True]}}
    prompt = f"{PROMPT}<lora:emoji_lcm_lora:1>"
    painted = webui.paint(prompt=prompt, sampler_name="Euler", steps=20, cfg_scale=7, alwayson_scripts=auto)
    check(painted, "LCM Suite", diffusers_timesteps(4), 1)
    plain = webui.paint(sampler_name="Euler", steps=20, cfg_scale=7, alwayson_scripts=auto)
    assert plain.sampler == "Euler"
    assert len(plain.calls) == 20
    offered = webui.paint(prompt=prompt, sampler_name="Euler", steps=3, cfg_scale=7)
    assert offered.sampler == "Euler"
    assert "LCM Suite, 3 steps, CFG 1 would suit it" in offered.said


def test_auto_sets_what_a_lora_states(webui: WebUI) -> None:
    """Steps, gamma and original steps from the file, unless the request names others."""
    webui.load("emoji_teacher")
    prompt = f"{PROMPT}<lora:phased:1>"
    for gamma, original_steps, wanted, grid in ((0.3, 50, 0, 25), (0.7, 20, 0.7, 20)):
        auto = {"LCM Suite": {"args": [True, gamma, original_steps]}}
        painted = webui.paint(prompt=prompt, sampler_name="Euler", steps=20, cfg_scale=7, alwayson_scripts=auto)
        check(painted, "TCD Suite", diffusers_timesteps(2, original_steps=grid), 1)
        assert f"LCM original steps: {grid}" in painted.infotext
        assert f"TCD gamma: {wanted:g}," in painted.infotext.replace(".0,", ",")


def test_button_sets_what_suits_the_models(webui: WebUI) -> None:
    """As the page calls it; its answers go into the page's own sampler, steps and CFG."""
    config = webui.call("/config")
    button = next(part["id"] for part in config["components"] if _elem_id(part).endswith("lcm_suite_offer"))
    targets = [part["id"] for part in config["components"] if _elem_id(part) in ("txt2img_sampling", "txt2img_steps")]
    clicked = [button, [button, "click"]]  # as gradio 3 and 4 write it
    calls = enumerate(config["dependencies"])
    fn_index = next(i for i, call in calls if any(target in clicked for target in call["targets"]))
    assert set(targets) <= set(config["dependencies"][fn_index]["outputs"])

    def press(checkpoint: str, prompt: str, original_steps: int = 50) -> list[object]:
        webui.load(checkpoint)
        body = {"fn_index": fn_index, "session_hash": "test", "data": [prompt, "Euler", 20, 7, 0.3, original_steps]}
        return webui.call("/run/predict", body)["data"]

    said = "emoji_lcm_lora is made for few steps: LCM Suite, 4 steps, CFG 1."
    assert press("emoji_teacher", "pizza <lora:emoji_lcm_lora:1>") == ["LCM Suite", 4, 1, 0.3, 50, said]
    assert press("emoji_teacher", "pizza <lora:phased:1>")[:5] == ["TCD Suite", 2, 1, 0, 25]
    assert press("emoji_lcm", "pizza", original_steps=25)[:5] == ["LCM Suite", 4, 2, 0.3, 50]
    assert press("emoji_teacher", "pizza")[:5] == ["Euler", 20, 7, 0.3, 50]


def _elem_id(part: dict[str, dict[str, object]]) -> str:
    return str(part["props"].get("elem_id") or "")


def test_plot_axes(webui: WebUI) -> None:
    """X/Y/Z plot of the guidance and of gamma: the cells are the pictures painted one by one."""
    webui.load("emoji_lcm")
    choices = _axes(webui)
    guidance, gamma = (choices.index(f"[LCM Suite] {name}") for name in ("guidance, w + 1", "TCD gamma"))
    args = _plot_args(webui, {"x": (guidance, "2, 9"), "y": (gamma, "0, 1")})
    plot = webui.paint(sampler_name="TCD Suite", cfg_scale=7, script_name="x/y/z plot", script_args=args)
    cells = plot.pictures[1:] if len(plot.pictures) == 5 else plot.pictures[-4:]
    for cell, (scale, share) in zip(cells, [(2, 0), (9, 0), (2, 1), (9, 1)], strict=True):
        wanted = reference(pipeline("emoji", "lcm"), guidance_scale=float(scale), sampler="tcd", gamma=float(share))
        assert difference(cell, wanted) <= 1


def _axes(webui: WebUI) -> list[str]:
    parts = webui.call("/config")["components"]
    drop = next(part for part in parts if _elem_id(part).endswith("xyz_plot_x_type"))
    return [choice[0] if isinstance(choice, list) else choice for choice in drop["props"]["choices"]]


def _plot_args(webui: WebUI, axes: dict[str, tuple[int, str]]) -> list[object]:
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


def test_reloads_and_checkpoint_changes(webui: WebUI) -> None:
    """Reload UI three times, change the checkpoint and back: everything once, and the guidance still right."""
    webui.load("emoji_lcm")
    before = webui.paint(sampler_name="LCM Suite", cfg_scale=5)
    for _ in range(3):
        webui.reload_ui()
    test_samplers_and_schedule_listed_once(webui)
    parts = webui.call("/config")["components"]
    for tab in ("txt2img", "img2img"):
        drop = next(part for part in parts if _elem_id(part) == f"{tab}_sampling")
        assert [str(choice) for choice in drop["props"]["choices"]].count(str(_choice(drop, "LCM Suite"))) == 1
    assert sum(axis.startswith("[LCM Suite]") for axis in _axes(webui)) == 2
    webui.load("emoji_teacher")
    plain = webui.paint(sampler_name="LCM Suite", cfg_scale=5)
    assert plain.batches == [2] * 4  # ordinary guidance, and nothing left behind of the other kind
    webui.load("emoji_lcm")
    after = webui.paint(sampler_name="LCM Suite", cfg_scale=5)
    assert after.calls == before.calls
    assert difference(after.pictures[0], before.pictures[0]) == 0


def _choice(drop: dict[str, dict[str, list[object]]], name: str) -> object:
    return next(choice for choice in drop["props"]["choices"] if choice == name or choice == [name, name])


def test_bad_input_is_said_and_the_webui_goes_on(webui: WebUI) -> None:
    webui.load("emoji_teacher")
    sdxl = webui.data / "models" / "Lora" / "lcm-lora-sdxl.safetensors"
    _write_lora(sdxl, 2048)
    webui.call("/sdapi/v1/refresh-loras", {})
    cases = {
        "was made for SDXL": {"prompt": "pizza <lora:lcm-lora-sdxl:1>"},
        "TCD gamma 2.0 is out of range": {"alwayson_scripts": {"LCM Suite": {"args": [False, 2]}}},
        "emoji_teacher is no full LCM": {"script_name": "x/y/z plot", "script_args": _guidance_plot(webui)},
    }
    for message, body in cases.items():
        with pytest.raises(HttpError, match=message):
            webui.paint(sampler_name="LCM Suite", **body)
    check(webui.paint(sampler_name="LCM Suite"), "LCM Suite", diffusers_timesteps(4), 1)


def _guidance_plot(webui: WebUI) -> list[object]:
    return _plot_args(webui, {"x": (_axes(webui).index("[LCM Suite] guidance, w + 1"), "2, 9")})


def _write_lora(file: Path, width: int) -> None:
    import torch
    from safetensors.torch import save_file

    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        "lora_down.weight": torch.zeros(4, width),
        "lora_up.weight": torch.zeros(640, 4),
        "alpha": torch.ones(()),
    }
    save_file({f"{stem}.{name}": tensor for name, tensor in tensors.items()}, file)


def test_pictures_are_not_blank(webui: WebUI) -> None:
    """The comparisons above would hold for black pictures too."""
    webui.load("emoji_lcm")
    assert np.asarray(webui.paint(sampler_name="LCM Suite", cfg_scale=2).pictures[0]).std() > 20
