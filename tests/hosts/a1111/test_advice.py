"""What the real web UI says of settings that do not fit, and what sets them: by itself, or by the button."""

from __future__ import annotations

import json

import pytest
from sampling_references import NEGATIVE, PROMPT, check, diffusers_timesteps, drawing, elem_id
from webui_harness import EMOJI, WebUI, to_base64

pytestmark = pytest.mark.host


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


def clicked(webui: WebUI, *outputs: str) -> int:
    """The number of the call that the accordion's button makes with these outputs among its own."""
    config = webui.call("/config")
    button = next(part["id"] for part in config["components"] if elem_id(part).endswith("lcm_suite_offer"))
    targets = {part["id"] for part in config["components"] if elem_id(part) in outputs}
    assert len(targets) == len(outputs)
    click = [button, [button, "click"]]  # as gradio 3 and 4 write it
    calls = enumerate(config["dependencies"])
    return next(
        i for i, call in calls if any(target in click for target in call["targets"]) and targets <= set(call["outputs"])
    )


def press(webui: WebUI, fn_index: int, *data: object) -> list[object]:
    body = {"fn_index": fn_index, "session_hash": "test", "data": list(data)}
    return webui.call("/run/predict", body)["data"]


def test_button_sets_what_suits_the_models(webui: WebUI) -> None:
    """As the page calls it; its answers go into the page's own prompts, sampler, steps and CFG."""
    call = clicked(webui, "txt2img_prompt", "txt2img_neg_prompt", "txt2img_sampling", "txt2img_steps")
    usual = ("Euler", 20, 7, 0.3)
    said = "emoji_lcm_lora is made for few steps: LCM Suite, 4 steps, CFG 1."
    webui.load("emoji_teacher")
    prompt = "pizza <lora:emoji_lcm_lora:1>"
    answer = press(webui, call, prompt, NEGATIVE, *usual, 50)
    assert answer == [prompt, NEGATIVE, "LCM Suite", 4, 1, 0.3, 50, said]
    assert press(webui, call, "pizza <lora:phased:1>", "", *usual, 50)[2:7] == ["TCD Suite", 2, 1, 0, 25]
    assert press(webui, call, "pizza", NEGATIVE, *usual, 50)[:7] == ["pizza", NEGATIVE, *usual, 50]
    webui.load("emoji_lcm")
    stated = json.loads((EMOJI / "model.json").read_text(encoding="utf-8"))["guidance_scale"]
    assert press(webui, call, "pizza", NEGATIVE, *usual, 25)[:7] == ["pizza", "", "LCM Suite", 4, stated, 0.3, 50]


def test_button_puts_right_what_is_remarked_on(webui: WebUI) -> None:
    """A plain checkpoint gets an LCM-LoRA that is there; a refiner of the other kind is taken out."""
    webui.load("emoji_teacher")
    call = clicked(webui, "txt2img_prompt", "txt2img_neg_prompt", "txt2img_sampling", "txt2img_steps")
    prompt, _, *settings = press(webui, call, "pizza", "", "LCM Suite", 4, 1, 0.3, 50)
    assert prompt == "pizza <lora:emoji_lcm_lora:1>"
    assert settings[:3] == ["LCM Suite", 4, 1]
    refiner = clicked(webui, "txt2img_checkpoint")
    full, plain = (webui.title(name) for name in ("emoji_lcm", "other_teacher"))
    none = "None" if webui.kind == "NEO" else ""
    assert press(webui, refiner, "LCM Suite", full) == [none]
    assert press(webui, refiner, "LCM Suite", plain) == [plain]
    assert press(webui, refiner, "Euler", full) == [full]
