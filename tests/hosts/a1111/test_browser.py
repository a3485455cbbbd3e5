"""The pages of the real web UIs in a real browser: what a user clicks, and what comes of it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from webui_harness import WebUI, difference
from webui_page import (
    SECOND,
    browser_page,
    choose,
    fill,
    generate,
    open_page,
    open_tab,
    set_up,
    shoot,
    value_of,
    wait_for_active,
)
from webui_tab import distil

from lcm_core.pipeline import Pipeline

pytestmark = pytest.mark.host
PIZZA = "a slice of pizza, noto style"
SETTINGS = {"steps": 3, "width": 64, "height": 64, "cfg_scale": 2, "seed": 5}


@pytest.fixture(scope="module")
def page(webui: WebUI) -> Iterator[Any]:
    webui.load("emoji_lcm")
    with browser_page(webui) as opened:
        yield opened


def test_pick_generate_and_paste_back(webui: WebUI, page: Any) -> None:
    set_up(page, PIZZA, "LCM Suite", **SETTINGS)
    picture = Image.open(io.BytesIO(generate(page)[0]))
    shoot(page, webui, "generated")
    infotext = picture.info["parameters"]
    assert "Sampler: LCM Suite" in infotext
    pipe = Pipeline.load("emoji", device="cpu", dtype="float32")
    wanted = pipe(PIZZA, seed=5, num_inference_steps=3, guidance_scale=2.0, width=64, height=64).images[0]
    assert difference(picture.convert("RGB"), wanted) <= 1
    choose(page, "#txt2img_sampling", "Euler")
    fill(page, "#txt2img_steps", 20)
    fill(page, "#txt2img_prompt", infotext)
    page.click("#paste")
    page.wait_for_function("() => document.querySelector('#txt2img_steps input[type=number]').value === '3'")
    page.wait_for_timeout(2 * SECOND)
    shoot(page, webui, "pasted")
    assert value_of(page, "#txt2img_sampling") == "LCM Suite"
    assert value_of(page, "#txt2img_prompt") == PIZZA
    assert value_of(page, "#txt2img_seed") == "5"
    assert difference(Image.open(io.BytesIO(generate(page)[0])).convert("RGB"), wanted) <= 1


def test_travel_shows_a_moving_picture_and_its_frames(webui: WebUI, page: Any) -> None:
    set_up(page, PIZZA, "LCM Suite", **SETTINGS)
    choose(page, "#script_list", "LCM latent travel")
    page.wait_for_selector("[id$=lcm_travel_points] textarea:visible")
    fill(page, "#script_txt2img_lcm_latent_travel_lcm_travel_points", "a green pear, twemoji style @ 7\n@ 9")
    fill(page, "#script_txt2img_lcm_latent_travel_lcm_travel_frames", 5)
    shown = [Image.open(io.BytesIO(data)) for data in generate(page)]
    shoot(page, webui, "travel")
    moving = [picture for picture in shown if picture.format == "GIF"]
    assert len(moving) == 1
    assert moving[0].n_frames == 5
    assert len(shown) >= 6


def test_distil_starts_once_survives_a_reload_stops_and_finishes(webui: WebUI, page: Any, tmp_path: Path) -> None:
    distil(webui, page, tmp_path)


def test_the_new_lora_is_taken_into_the_page(webui: WebUI, page: Any) -> None:
    """After the run above: prompt, sampler, steps and CFG; and its picture names it."""
    webui.load("emoji_teacher")
    open_tab(page)
    wait_for_active(page, "start", "use")
    page.evaluate("() => switch_to_txt2img()")
    set_up(page, "a red circle, noto style", "Euler", steps=20, cfg_scale=7, width=64, height=64)
    open_tab(page)
    page.click("#lcm_distil_use")
    page.wait_for_function("() => document.querySelector('#txt2img_steps input[type=number]').value === '4'")
    page.wait_for_selector("#txt2img_generate:visible")
    assert value_of(page, "#txt2img_prompt") == "a red circle, noto style <lora:circles:1>"
    assert value_of(page, "#txt2img_sampling") == "LCM Suite"
    assert value_of(page, "#txt2img_cfg_scale") == "1"
    shoot(page, webui, "distil-used")
    infotext = Image.open(io.BytesIO(generate(page)[0])).info["parameters"]
    assert "circles" in infotext
    assert "Sampler: LCM Suite" in infotext


def test_only_what_the_sampler_reads_is_shown(webui: WebUI, page: Any) -> None:
    page.evaluate("() => switch_to_txt2img()")
    page.locator("[id$=txt2img_lcm_suite_lcm_suite] .label-wrap").first.click()
    for sampler, gamma, grid in (("TCD Suite", True, True), ("LCM Suite", False, True), ("Euler", False, False)):
        choose(page, "#txt2img_sampling", sampler)
        page.wait_for_timeout(2 * SECOND)
        sliders = [page.locator(f"[id$=txt2img_lcm_suite_lcm_suite_{name}]") for name in ("gamma", "original_steps")]
        assert [slider.is_visible() for slider in sliders] == [gamma, grid], sampler


TRAVEL = """() => {
    let box = [...document.querySelectorAll("[id$=lcm_travel_points]")].find(found => found.offsetParent);
    while (!box.parentElement.querySelector("#script_list")) box = box.parentElement;
    return box.innerText;
}"""
"""The words of the script: all that lies beside the list of scripts."""
SETTINGS_PAGE = """() => {
    const ours = [...document.querySelectorAll("[id^=setting_lcm_suite]")].map(found => found.textContent);
    if (ours.length < 6) throw new Error("the settings are not on the page");
    return ours.join(" ");
}"""
NAMES = re.compile(
    r"LCM|LoRA|TCD|CFG|MP|GB|Web|UI|Suite|Python|python|trainer|distill|emoji|noto|auto|txt|lora|Extra|pip|install|av|"
    r"DPM|SDE|sd|sdxl|gif|webp|mp|linear|slerp|lerp|smooth|circles|safetensors|lcm|outputs|venv|distil"
)
"""What is the same in every language: names, and what is typed as it is."""


@contextmanager
def translated(webui: WebUI, language: str) -> Iterator[None]:
    """The page in a language. Its texts of help are chosen when it is built, in some hosts its labels too."""
    webui.call("/sdapi/v1/options", {"localization": language})
    webui.reload_ui()
    try:
        yield
    finally:
        webui.call("/sdapi/v1/options", {"localization": "None"})
        webui.reload_ui()


@pytest.mark.parametrize(
    ("language", "tab"), [("ko_KR", "LCM 증류"), ("ja_JP", "LCM 蒸留"), ("zh_CN", "LCM 蒸馏")], ids=["ko", "ja", "zh"]
)
def test_no_english_is_left_on_a_translated_page(webui: WebUI, page: Any, language: str, tab: str) -> None:
    """Nor in what the tab says of a mistake. Screenshots of both pages are kept to be looked at."""
    webui.call("/sdapi/v1/options", {"lcm_suite_distil_python": ""})
    with translated(webui, language):
        words = words_of(webui, page, language, tab)
    found = set(re.findall(r"[A-Za-z]{2,}", re.sub(r"\S*/\S*", "", words)))  # paths are names too
    assert {word for word in found if not NAMES.fullmatch(word)} == set()


def words_of(webui: WebUI, page: Any, language: str, tab: str) -> str:
    """All words of the accordion, of travel, of the settings, and of the tab, where a run is started that cannot be."""
    open_page(page, webui)
    accordion = page.locator("[id$=txt2img_lcm_suite_lcm_suite]").first
    accordion.locator(".label-wrap").first.click()
    choose(page, "#txt2img_sampling", "TCD Suite")
    page.wait_for_timeout(2 * SECOND)
    shoot(page, webui, f"accordion-{language}")
    choose(page, "#script_list", "LCM latent travel")
    page.wait_for_selector("[id$=lcm_travel_points] textarea:visible")
    page.wait_for_timeout(SECOND)
    shoot(page, webui, f"travel-{language}")
    words = accordion.inner_text() + page.evaluate(TRAVEL) + page.evaluate(SETTINGS_PAGE)
    page.locator("#tabs > div button").filter(has_text=tab).first.click()
    page.wait_for_selector("#lcm_distil_start:visible")
    page.wait_for_timeout(5 * SECOND)
    page.click("#lcm_distil_start")
    page.wait_for_selector("#lcm_distil_said [role=alert]")
    shoot(page, webui, f"distil-{language}")
    return str(words + page.locator("#tab_lcm_distil").inner_text())
