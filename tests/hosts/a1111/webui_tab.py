"""The tab "LCM Distil" in a web UI's page, from the first click to the pictures of the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from webui_harness import WebUI
from webui_page import ask_for_plan, fill, open_page, open_tab, shoot, wait_for_active, wait_for_view


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
    fill(page, "#lcm_distil_more", "--samples 0 --resolution 64 --preview-every 5 --save-every 1 --device cpu")


def distil(webui: WebUI, page: Any, folder: Path) -> None:
    """Fail to start, plan, start, load the page anew, stop, continue, stop, finish; the LoRA is called `circles`."""
    open_tab(page)
    teach(page, folder / "pictures", "circles", steps=9999)  # too long to end by itself
    webui.call("/sdapi/v1/options", {"lcm_suite_distil_python": ""})
    wait_for_active(page, "start", "python")
    page.click("#lcm_distil_start")
    page.wait_for_function("() => document.querySelector('#lcm_distil_said').innerText.includes('no Python')")
    assert page.locator("#lcm_distil_said [role=alert]").first.is_visible()
    shoot(page, webui, "distil-no-python")
    webui.call("/sdapi/v1/options", {"lcm_suite_distil_python": sys.executable})
    wait_for_active(page, "start")
    planned = ask_for_plan(page)
    assert "Preset: emoji" in planned
    assert "Memory at the peak" in planned
    shoot(page, webui, "distil-plan")
    page.click("#lcm_distil_start")
    wait_for_view(page, "Running.")
    wait_for_active(page, "stop")
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
    wait_for_active(page, "start", "continue")
    page.click("#lcm_distil_continue")
    wait_for_view(page, "Running.")
    wait_for_active(page, "stop")
    page.click("#lcm_distil_stop")
    wait_for_view(page, "Stopped.")
    teach(page, folder / "pictures", "circles", steps=1)  # it has done more: what is left is to write the LoRA
    page.click("#lcm_distil_start")
    wait_for_view(page, "Finished.")
    shoot(page, webui, "distil-finished")
    assert list(webui.data.rglob("Lora/circles.safetensors"))
    page.wait_for_selector("#lcm_distil_view .lcm-pairs img")
    assert "Teacher with 25 steps, student with 4 steps" in page.locator("#lcm_distil_view").first.inner_text()
    with page.expect_response(lambda answer: "report.html" in answer.url) as report:
        page.evaluate("() => fetch(document.querySelector('#lcm_distil_view a').href)")
    assert report.value.ok
    shoot(page, webui, "distil-pictures")
