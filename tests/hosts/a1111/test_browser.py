"""The pages of the real web UIs in a real browser: what a user clicks, and what comes of it."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from webui_harness import WebUI, difference

from lcm_core.pipeline import Pipeline

pytestmark = pytest.mark.host
playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PIZZA = "a slice of pizza, noto style"
SECOND = 1000
PATIENCE = 300 * SECOND


@pytest.fixture(scope="module")
def page(webui: WebUI) -> Iterator[Any]:
    """The web UI's page, loaded and ready. Screenshots go to `screenshots` beside the web UI's log."""
    if not CHROMIUM:
        pytest.skip("no chromium was found; name one in CHROMIUM")
    webui.load("emoji_lcm")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1400, "height": 1300})
        opened.set_default_timeout(PATIENCE)
        open_page(opened, webui)
        yield opened
        browser.close()


def open_page(page: Any, webui: WebUI) -> None:
    page.goto(f"http://127.0.0.1:{webui.port}", timeout=PATIENCE)
    page.wait_for_selector("#txt2img_generate", timeout=PATIENCE)
    page.wait_for_function("typeof onUiLoaded !== 'undefined' && uiCurrentTab !== null")
    page.wait_for_timeout(5 * SECOND)  # the page goes on filling itself in


def shoot(page: Any, webui: WebUI, name: str) -> None:
    folder = webui.data / "screenshots"
    folder.mkdir(exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")


def choose(page: Any, selector: str, value: str) -> None:
    """In a dropdown."""
    box = page.locator(f"{selector} input").first
    box.click()
    box.fill(value)
    page.click(f'[data-testid=dropdown-option][aria-label="{value}"]')


def fill(page: Any, selector: str, value: object) -> None:
    box = page.locator(f"{selector} textarea, {selector} input[type=number], {selector} input[type=text]").first
    box.fill(str(value))
    box.dispatch_event("change")
    box.blur()


def generate(page: Any) -> list[bytes]:
    """Press the button, and wait for new pictures."""
    gallery = "#txt2img_gallery img"
    before = page.evaluate(f"() => [...document.querySelectorAll({gallery!r})].map(i => i.src).join()")
    page.click("#txt2img_generate")
    page.wait_for_function(
        f"before => {{ const now = [...document.querySelectorAll({gallery!r})].map(i => i.src).join();"
        " return now && now !== before; }",
        arg=before,
    )
    page.wait_for_timeout(2 * SECOND)
    sources = page.evaluate(f"() => [...new Set([...document.querySelectorAll({gallery!r})].map(i => i.src))]")
    return [page.request.get(source).body() for source in sources]


def set_up(page: Any, sampler: str = "LCM Suite") -> None:
    fill(page, "#txt2img_prompt", PIZZA)
    choose(page, "#txt2img_sampling", sampler)
    for name, value in (("steps", 3), ("width", 64), ("height", 64), ("cfg_scale", 2), ("seed", 5)):
        fill(page, f"#txt2img_{name}", value)


def value_of(page: Any, selector: str) -> str:
    return page.locator(f"{selector} input, {selector} textarea").first.input_value()


def test_pick_generate_and_paste_back(webui: WebUI, page: Any) -> None:
    set_up(page)
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
    set_up(page)
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


def teach(page: Any, folder: Path, name: str, steps: int) -> None:
    """Fill in the tab: a run on three pictures."""
    folder.mkdir(exist_ok=True)
    for colour in ("red", "green", "blue"):
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((8, 8, 56, 56), fill=colour)
        picture.save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} circle, noto style")
    fill(page, "#lcm_distil_name", name)
    fill(page, "#lcm_distil_data", folder)
    fill(page, "#lcm_distil_steps", steps)
    fill(page, "#lcm_distil_batch", 1)
    fill(page, "#lcm_distil_more", "--samples 0 --preview-every 5 --save-every 1 --device cpu")


def open_tab(page: Any) -> None:
    page.get_by_role("tab", name="LCM Distil").or_(
        page.locator("#tabs > div > button:text-is('LCM Distil')")
    ).first.click()
    page.wait_for_selector("#lcm_distil_start:visible")


def wait_for_view(page: Any, text: str) -> None:
    page.wait_for_function(
        "text => document.querySelector('#lcm_distil_view').innerText.includes(text)", arg=text, timeout=2 * PATIENCE
    )


def said(page: Any) -> str:
    return page.locator("#lcm_distil_said").inner_text()


def test_distil_starts_once_survives_a_reload_stops_and_finishes(webui: WebUI, page: Any, tmp_path: Path) -> None:
    open_tab(page)
    teach(page, tmp_path / "pictures", "circles", steps=9999)  # too long to end by itself
    webui.call("/sdapi/v1/options", {"lcm_suite_distil_python": ""})
    page.click("#lcm_distil_start")
    page.wait_for_function("() => document.querySelector('#lcm_distil_said').innerText.includes('no Python')")
    shoot(page, webui, "distil-no-python")
    webui.call("/sdapi/v1/options", {"lcm_suite_distil_python": sys.executable})
    page.click("#lcm_distil_start")
    wait_for_view(page, "Running.")
    page.click("#lcm_distil_start")
    page.wait_for_function("() => document.querySelector('#lcm_distil_said').innerText.includes('is running already')")
    page.wait_for_selector("#lcm_distil_view img")  # the first preview
    shoot(page, webui, "distil-running")
    open_page(page, webui)  # the page is loaded anew
    open_tab(page)
    wait_for_view(page, "circles")
    page.click("#lcm_distil_stop")
    wait_for_view(page, "Stopped.")
    shoot(page, webui, "distil-stopped")
    assert not list(webui.data.rglob("Lora/circles.safetensors"))
    page.wait_for_selector("#lcm_distil_view svg")  # the loss
    page.click("#lcm_distil_continue")
    wait_for_view(page, "Running.")
    page.click("#lcm_distil_stop")
    wait_for_view(page, "Stopped.")
    teach(page, tmp_path / "pictures", "circles", steps=1)  # it has done more: what is left is to write the LoRA
    page.click("#lcm_distil_start")
    wait_for_view(page, "Finished.")
    shoot(page, webui, "distil-finished")
    assert list(webui.data.rglob("Lora/circles.safetensors"))
    painted = webui.paint(prompt="a red circle, noto style <lora:circles:1>", sampler_name="LCM Suite")
    assert "circles" in painted.infotext
