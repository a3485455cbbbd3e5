"""A web UI's page in a real browser: where things are on it, in every host."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from webui_harness import WebUI

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
SECOND = 1000
PATIENCE = 900 * SECOND  # a busy machine takes minutes to start the trainer


@contextmanager
def browser_page(webui: WebUI) -> Iterator[Any]:
    """The web UI's page, loaded and ready. Screenshots go to `screenshots` beside the web UI's log."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if not CHROMIUM:
        pytest.skip("no chromium was found; name one in CHROMIUM")
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


def set_up(page: Any, prompt: str, sampler: str, **numbers: float) -> None:
    """Text to image: prompt, sampler, and numbers by the ends of their ids."""
    fill(page, "#txt2img_prompt", prompt)
    choose(page, "#txt2img_sampling", sampler)
    for name, value in numbers.items():
        fill(page, f"#txt2img_{name}", value)


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


def value_of(page: Any, selector: str) -> str:
    return page.locator(f"{selector} input, {selector} textarea").first.input_value()


def open_tab(page: Any) -> None:
    page.get_by_role("tab", name="LCM Distil").or_(
        page.locator("#tabs > div > button:text-is('LCM Distil')")
    ).first.click()
    page.wait_for_selector("#lcm_distil_start:visible")


def wait_for_view(page: Any, text: str) -> None:
    page.wait_for_function(
        "text => document.querySelector('#lcm_distil_view').innerText.includes(text)", arg=text, timeout=2 * PATIENCE
    )


def wait_for_active(page: Any, *names: str) -> None:
    """Wait until these buttons of the tab, and no others, can be pressed."""
    script = """names => ["start", "stop", "continue", "python", "use"].every(
        name => names.includes(name) !== document.querySelector(`#lcm_distil_${name}`).disabled)"""
    page.wait_for_function(script, arg=list(names))


def said(page: Any) -> str:
    return page.locator("#lcm_distil_said").first.inner_text()


def ask_for_plan(page: Any) -> str:
    """Press "Time and memory"; the plan, or a complaint other than the one that is there already."""
    before = said(page)
    page.click("#lcm_distil_plan")
    script = """before => {
        const box = document.querySelector("#lcm_distil_said"), wrong = box.querySelector("[role=alert]");
        return box.innerText.includes("Memory at the peak") || (wrong && wrong.innerText !== before);
    }"""
    page.wait_for_function(script, arg=before)
    return said(page)
