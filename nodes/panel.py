"""The page's panel of a running LCM Distiller (web/lcm_suite.js): what it is told, and what it asks for."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from PIL import Image

from .host import page_server

EVENT = "lcm_suite.distiller"
SHOWN, SAVE, STOP = "/lcm_suite/shown", "/lcm_suite/save", "/lcm_suite/stop"
_SMOOTHING = 0.05  # weight of the newest loss in the running mean
_POINTS = 200  # of the curve
_SIDE = 256  # pixels, at most, of a picture
_shown: dict[str, dict[str, Any]] = {}  # by node, all that its panel was told of the last run
_requests = {SAVE: threading.Event(), STOP: threading.Event()}
Show = Callable[[dict[str, Any]], None]


def register() -> None:
    """Let the page ask for what it has missed, and for a LoRA file or an end while a run goes on."""
    server = page_server()
    if server is None:
        return
    from aiohttp import web

    def hear(request: threading.Event) -> Callable[[Any], Awaitable[Any]]:
        async def heard(_: Any) -> Any:
            request.set()
            return web.json_response({})

        return heard

    async def shown(_: Any) -> Any:
        return web.json_response(list(_shown.values()))

    for path, request in _requests.items():
        server.routes.post(path)(hear(request))
    server.routes.get(SHOWN)(shown)


def send(node: str | None, told: dict[str, Any]) -> None:
    """Tell the page what a node has to show; a page that comes later can ask for it."""
    server = page_server()
    if server is not None and node is not None:
        _shown[node] = {**_shown.get(node, {}), "node": node, **told}
        server.send_sync(EVENT, {"node": node, **told})


class Panel:
    """What is shown of one run.

    Args:
        show: sends it to the page.
        steps: of the whole run.
        before: how many of them were done before this start.
    """

    def __init__(self, show: Show, steps: int, before: int) -> None:
        self.show, self.steps, self.before = show, steps, before
        self.begun = time.monotonic()
        self.saved: int | None = None  # steps that the file has learnt
        for request in _requests.values():
            request.clear()  # an earlier run's

    def tell(self, losses: Sequence[float], running: bool = True, **pictures: Image.Image) -> None:
        """Show the losses of all steps so far, whether more follow, and pictures that are new: `before`, `after`."""
        done = len(losses) - self.before
        left = (time.monotonic() - self.begun) / done * (self.steps - len(losses)) if done > 0 else None
        curve = running_mean(losses) if losses else []
        stride = max(1, -(-len(curve) // _POINTS))
        shown = [*curve[:-1:stride], *curve[-1:]]
        told = {"step": len(losses), "steps": self.steps, "losses": shown, "seconds_left": left}
        told |= {"saved": self.saved, "running": running}
        self.show(told | {name: _as_url(picture) for name, picture in pictures.items()})

    def wants(self, what: str) -> bool:
        """Whether the page has asked for the file (`SAVE`) or an end (`STOP`) since this was last asked."""
        request = _requests[what]
        if not request.is_set():
            return False  # without forgetting what is asked for at this very moment
        request.clear()
        return True


def _as_url(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def running_mean(values: Sequence[float]) -> list[float]:
    """Each value's mean with those before it, the older the lighter."""
    means = [values[0]]
    for value in values[1:]:
        means.append((1 - _SMOOTHING) * means[-1] + _SMOOTHING * value)
    return means
