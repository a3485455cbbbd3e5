"""A picture always comes back; see `round_trips.py`.

LCM_SUITE_ROUND_TRIPS says how many settings are tried in each web UI (default 24), or which: "100-200" leaves the
first 100 out.
"""

from __future__ import annotations

import os

import pytest
from round_trips import comes_back, paint_twice
from webui_harness import WebUI

pytestmark = pytest.mark.host
FIRST, LAST = map(int, f"0-{os.environ.get('LCM_SUITE_ROUND_TRIPS') or 24}".split("-")[-2:])
MODELS = (("emoji_teacher", ""), ("emoji_teacher", " <lora:emoji_lcm_lora:0.8>"), ("emoji_lcm", ""))
"""Plain, LoRA, full LCM: a checkpoint, and what the prompt ends with."""


@pytest.mark.parametrize(("checkpoint", "lora"), MODELS, ids=["plain", "lora", "full"])
def test_pasted_back_it_is_the_same_picture(webui: WebUI, checkpoint: str, lora: str) -> None:
    webui.load(checkpoint)
    numbers = [n for n in range(FIRST, LAST) if n % len(MODELS) == MODELS.index((checkpoint, lora))]
    differing = {}
    for number in numbers:
        first, again = paint_twice(webui, number, lora)
        if not comes_back(first, again):
            differing[number] = (first.infotext, again.infotext)
    assert differing == {}
