"""What LCM Distiller tells the page's panel."""

from __future__ import annotations

import base64
import io
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image


def test_the_panel_is_told_where_the_run_is(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step and the time left from the steps of this start, a curve of bounded length that ends on the newest mean,
    pictures only when they are new, and small; what the file holds, and that no more follows."""
    from lcm_suite_nodes import panel

    told: list[dict[str, Any]] = []
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(panel, "time", clock)
    now = 100.0
    shown = panel.Panel(told.append, steps=3000, before=1000)
    shown.tell([0.5] * 1000, before=Image.new("RGB", (1024, 512), "red"))
    assert told[-1]["seconds_left"] is None  # nothing has been done yet
    picture = Image.open(io.BytesIO(base64.b64decode(told[-1]["before"].removeprefix("data:image/jpeg;base64,"))))
    assert picture.size == (256, 128)
    now += 10.0
    losses = [0.5] * 1000 + [0.25] * 500
    shown.tell(losses)
    assert told[-1]["step"] == 1500
    assert told[-1]["seconds_left"] == pytest.approx(30)  # 500 steps in 10 s, 1,500 to go
    assert len(told[-1]["losses"]) <= 201
    assert told[-1]["losses"][-1] == pytest.approx(panel.running_mean(losses)[-1])
    assert "before" not in told[-1]
    assert told[-1]["running"]
    assert told[-1]["saved"] is None
    shown.saved = 1500
    shown.tell(losses, running=False)
    assert told[-1]["saved"] == 1500
    assert not told[-1]["running"]


@pytest.mark.parametrize("what", ["SAVE", "STOP"])
def test_a_request_is_heard_once_and_by_the_run_that_it_was_meant_for(runtime: Any, what: str) -> None:
    """Not by the next step, and not by a later run."""
    from lcm_suite_nodes import panel

    path = getattr(panel, what)
    shown = panel.Panel(lambda told: None, 10, 0)
    panel._requests[path].set()
    assert shown.wants(path)
    assert not shown.wants(path)
    panel._requests[path].set()
    assert not panel.Panel(lambda told: None, 10, 0).wants(path)


class Clicked(threading.Event):
    """A request that comes in the very moment in which it has been looked for."""

    def is_set(self) -> bool:
        was = super().is_set()
        self.set()
        return was


def test_no_request_is_lost_while_it_is_looked_for(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong when it is forgotten unheard: the page's button waits for the answer for ever."""
    from lcm_suite_nodes import panel

    shown = panel.Panel(lambda told: None, 10, 0)
    monkeypatch.setitem(panel._requests, panel.SAVE, Clicked())
    assert not shown.wants(panel.SAVE)
    assert shown.wants(panel.SAVE)


def test_a_page_that_comes_later_hears_all(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest of everything, each node by itself: pictures are told only once, and reach over a reload."""
    from lcm_suite_nodes import panel

    sent: list[Any] = []
    page = SimpleNamespace(send_sync=lambda event, told: sent.append(told))
    monkeypatch.setattr(panel, "page_server", lambda: page)
    monkeypatch.setattr(panel, "_shown", {})
    panel.send("6", {"step": 0, "before": "b", "after": "a"})
    panel.send("3:6", {"step": 7})
    panel.send("6", {"step": 2, "after": "c"})
    assert sent[-1] == {"node": "6", "step": 2, "after": "c"}
    assert list(panel._shown.values()) == [
        {"node": "6", "step": 2, "before": "b", "after": "c"},
        {"node": "3:6", "step": 7},
    ]
