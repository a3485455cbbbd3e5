"""The page's websocket: it sends what is on the canvas after every stroke, and gets a picture of the newest."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from lcm_core.files.reading import parse_json
from lcm_core.serve.fields import Fields, describe
from lcm_core.serve.painter import PictureRequest
from lcm_core.serve.service import Service, read_lora, read_options, read_seed

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

_TRY_AGAIN = 1013  # the websocket protocol's code for a server that has too many


async def live(socket: WebSocket, service: Service, open_pages: set[WebSocket]) -> None:
    """Serve one page until it goes away. A message that waits is replaced by the next one: the newest wins.

    Each picture, of "count" where that is given, is answered by a JSON text with "id", "seconds", "seed" and "side",
    then the PNG; "frames" by a loop as WebP; a mistake by a text with "error".
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
    while True:
        await arrived.wait()
        arrived.clear()
        await _answer(socket, service, newest.pop())


async def _answer(socket: WebSocket, service: Service, text: str | None) -> None:
    start = time.perf_counter()
    number = None
    try:
        values = parse_json(text or "", "the message", "send an object")
        number = values.get("id") if type(values.get("id")) is int else None
        request = await asyncio.to_thread(read_live, Fields(values, service.limits), service)
        painted = await service.paint(request)
    except Exception as error:
        await socket.send_json({"id": number, "error": describe(error)})
        return
    for picture in painted:
        seconds = round(time.perf_counter() - start, 4)
        said = picture.settings
        side = max(said["width"], said["height"])
        await socket.send_json({"id": number, "seconds": seconds, "seed": said["seed"], "side": side})
        await socket.send_bytes(picture.png)


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
