"""The samplers in the real web UI: what the U-Net is asked, and the picture, against diffusers and lcm_core."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import LCMScheduler
from sampling_references import (
    NEGATIVE,
    PROMPT,
    check,
    check_listed_once,
    diffusers_timesteps,
    drawing,
    left_half,
    pipeline,
    reference,
)
from webui_harness import WebUI, difference, to_base64

pytestmark = pytest.mark.host


def test_samplers_and_schedule_listed_once(webui: WebUI) -> None:
    check_listed_once(webui)


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
    settings = {"sampler_name": "LCM Suite", "cfg_scale": 2, "denoising_strength": 0.8}
    painted = webui.paint("img2img", **settings, **left_half(drawing()))
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


def test_pictures_are_not_blank(webui: WebUI) -> None:
    """The comparisons above would hold for black pictures too."""
    webui.load("emoji_lcm")
    assert np.asarray(webui.paint(sampler_name="LCM Suite", cfg_scale=2).pictures[0]).std() > 20
