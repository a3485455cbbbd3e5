"""The page's websocket: it sends what is on the canvas after every stroke, and gets a picture of the newest."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from lcm_core.files.reading import parse_json
from lcm_core.serve.fields import Fields, describe
from lcm_core.serve.painter import Lane, Painted, PictureRequest
from lcm_core.serve.service import Service, read_lora, read_options, read_seed

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

_TRY_AGAIN = 1013  # the websocket protocol's code for a server that has too many


async def live(socket: WebSocket, service: Service, open_pages: set[WebSocket]) -> None:
    """Serve one page until it goes away. A message that waits is replaced by the next one: the newest wins.

    Each picture, of "count" where that is given, is answered by a JSON text with "id", "seconds" that it took, "every"
    (seconds from one picture to the next where several are under way), "seed" and "side", then the PNG; "frames" by a
    loop as WebP; a mistake by a text with "error". Of drafts several may be under way; one that is overtaken by a newer
    one is not sent.
    """
    if len(open_pages) >= service.limits.live:
        await socket.close(_TRY_AGAIN)
        return
    open_pages.add(socket)
    newest: list[Any] = []
    arrived = asyncio.Event()
    try:
        await socket.accept()
        answers = asyncio.ensure_future(_answer_all(socket, service, newest, arrived))
        try:
            while (message := await socket.receive())["type"] == "websocket.receive":
                newest[:] = [message.get("text")]
                arrived.set()
        finally:
            answers.cancel()
            await asyncio.gather(answers, return_exceptions=True)
    finally:
        open_pages.discard(socket)


async def _answer_all(socket: WebSocket, service: Service, newest: list[Any], arrived: asyncio.Event) -> None:
    """Paint the newest message again and again: in each lane as many at once as it is wide."""
    page = _Page(socket)
    under_way: dict[Lane, set[asyncio.Task[None]]] = defaultdict(set)
    try:
        while True:
            await arrived.wait()
            arrived.clear()
            asked = await _read(page, service, newest.pop())
            if asked is None:
                continue
            tasks = under_way[asked.lane]
            if len(tasks) >= asked.lane.width:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if arrived.is_set():  # this one is old by now
                    continue
            task = asyncio.ensure_future(_answer(page, service, asked))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    finally:
        for task in chain(*under_way.values()):
            task.cancel()


@dataclass(frozen=True)
class _Asked:
    """A message that can be painted."""

    place: int
    """Among the messages of its page."""
    number: int | None
    """The page's own "id"."""
    request: PictureRequest
    lane: Lane
    start: float


class _Page:
    """What a page is sent: whole answers, and none that is older than what it has."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._lock = asyncio.Lock()
        self._shown = -1
        self.messages = 0
        """That were read."""

    async def refuse(self, number: int | None, error: Exception) -> None:
        """Say what is wrong with a message."""
        async with self._lock:
            await self._socket.send_json({"id": number, "error": describe(error)})

    async def show(self, asked: _Asked, painted: list[Painted]) -> None:
        """Send pictures."""
        async with self._lock:
            if asked.place < self._shown:
                return
            self._shown = asked.place
            for picture in painted:
                await self._socket.send_json(_header(asked, picture.settings))
                await self._socket.send_bytes(picture.png)


def _header(asked: _Asked, settings: dict[str, Any]) -> dict[str, Any]:
    seconds = time.perf_counter() - asked.start
    return {
        "id": asked.number,
        "seconds": round(seconds, 4),
        "every": round(seconds / asked.lane.width, 4),
        "seed": settings["seed"],
        "side": max(settings["width"], settings["height"]),
    }


async def _read(page: _Page, service: Service, text: str | None) -> _Asked | None:
    """A message; None where it is wrong, which the page has been told then."""
    start, number = time.perf_counter(), None
    place, page.messages = page.messages, page.messages + 1
    try:
        values = parse_json(text or "", "the message", "send an object")
        number = values.get("id") if type(values.get("id")) is int else None
        request = await asyncio.to_thread(read_live, Fields(values, service.limits), service)
        return _Asked(place, number, request, service.painter.lane(request), start)
    except Exception as error:
        await page.refuse(number, error)
        return None


async def _answer(page: _Page, service: Service, asked: _Asked) -> None:
    try:
        painted = await service.paint(asked.request)
    except Exception as error:
        await page.refuse(asked.number, error)
    else:
        await page.show(asked, painted)


def read_live(fields: Fields, service: Service) -> PictureRequest:
    """A message of the page.

    Raises:
        RequestError: names the field.
    """
    image = fields.picture("image")
    options = read_options(fields)
    if image is not None:
        options["strength"] = fields.number("strength", 0.01, 1.0)
    options["second_prompt"] = fields.text("second_prompt") or None
    options["blend"] = fields.number("blend", 0, 1) if options["second_prompt"] else None
    count = fields.whole("count", 1, fields.limits.pictures, default=1) or 1
    frames = fields.whole("frames", 2, fields.limits.frames, default=0) or 0
    model, loras = fields.text("model") or service.shelf.usual, read_lora(fields)
    service.shelf.check(model, loras)
    prompt, seed, draft = fields.text("prompt"), read_seed(fields), fields.flag("draft")
    return PictureRequest(model, prompt, seed, count, loras, options, image, draft=draft, frames=frames)
