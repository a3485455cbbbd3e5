"""The application: the page, its websocket, and the two web APIs on one port."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_core.errors import InputError
from lcm_core.files.reading import parse_json
from lcm_core.serve import a1111, openai
from lcm_core.serve.fields import Fields, RequestError, describe
from lcm_core.serve.guard import LOOPBACK, App, Guard
from lcm_core.serve.live import live
from lcm_core.serve.service import Service

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.websockets import WebSocket

Handler = Callable[[Service, Fields], Awaitable[dict[str, Any]]]

PAGE = Path(__file__).parent / "page"
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/drawing.js": ("drawing.js", "text/javascript"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; connect-src 'self' blob:; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_POSTED: dict[str, Handler] = {
    "/v1/images/generations": openai.generate,
    "/sdapi/v1/txt2img": a1111.txt2img,
    "/sdapi/v1/img2img": a1111.img2img,
    "/sdapi/v1/interrupt": a1111.interrupt,
    "/sdapi/v1/options": a1111.set_options,
}
_ASKED: dict[str, Callable[[Service], Any]] = {
    "/v1/models": openai.models,
    "/sdapi/v1/progress": a1111.progress,
    "/sdapi/v1/samplers": a1111.samplers,
    "/sdapi/v1/sd-models": a1111.sd_models,
    "/sdapi/v1/loras": a1111.loras,
    "/sdapi/v1/options": a1111.options,
}
_CLIENT_GONE = 499


def build_app(service: Service, token: str | None = None, hosts: frozenset[str] | None = LOOPBACK) -> App:
    """The ASGI application, behind its guard; see `Guard` for `token` and `hosts`."""
    from starlette.applications import Starlette
    from starlette.routing import BaseRoute, Route, WebSocketRoute

    open_pages: set[WebSocket] = set()

    async def socket(websocket: WebSocket) -> None:
        await live(websocket, service, open_pages)

    routes: list[BaseRoute] = [Route(path, partial(_file, *file)) for path, file in _FILES.items()]
    routes += [Route(path, partial(_post, handler, service), methods=["POST"]) for path, handler in _POSTED.items()]
    routes += [Route(path, partial(_ask, answer, service)) for path, answer in _ASKED.items()]
    routes += [Route("/choices", partial(_ask, _choices, service)), WebSocketRoute("/live", socket)]
    app = Starlette(routes=routes, exception_handlers={InputError: _refuse, Exception: _fail})
    return Guard(app, token, hosts)


async def _file(name: str, kind: str, request: Request) -> Response:
    from starlette.responses import Response

    return Response((PAGE / name).read_bytes(), media_type=kind, headers=_PAGE_HEADERS)


async def _ask(answer: Callable[[Service], Any], service: Service, request: Request) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(answer(service))


async def _post(handler: Handler, service: Service, request: Request) -> Response:
    """Run a handler on the request's JSON; when the client goes away, the painting stops."""
    try:
        return await _answer(handler, service, request)
    except asyncio.CancelledError:  # the server ends and has waited long enough
        return _line(503, "the server is ending")


async def _answer(handler: Handler, service: Service, request: Request) -> Response:
    from starlette.responses import JSONResponse, Response

    body = await _read_body(request, service)
    work = asyncio.ensure_future(handler(service, Fields(body, service.limits)))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(work.result()) if work.done() else Response(status_code=_CLIENT_GONE)
    finally:
        work.cancel()
        gone.cancel()


async def _read_body(request: Request, service: Service) -> dict[str, Any]:
    from starlette.requests import ClientDisconnect

    limits = service.limits

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.body:
                raise RequestError(f"the request has more than {limits.body:,} bytes; send less", 413)
        return bytes(body)

    try:
        body = await asyncio.wait_for(read(), limits.body_seconds)
    except ClientDisconnect:
        raise RequestError("the client went away before its request was complete", _CLIENT_GONE) from None
    except asyncio.TimeoutError:
        raise RequestError(f"the request took longer than {limits.body_seconds:g} s to arrive", 408) from None
    return parse_json(body, "the request", "send an object") if body else {}


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _choices(service: Service) -> dict[str, Any]:
    """What the page offers."""
    shelf, limits = service.shelf, service.limits
    models = [{"name": name, "loras": shelf.lora_names(name)} for name in shelf.models]
    return {"models": models, "usual": shelf.usual, "steps": limits.steps, "side": limits.side}


async def _refuse(request: Request, error: Exception) -> Response:
    return _line(getattr(error, "status", 400), describe(error))


async def _fail(request: Request, error: Exception) -> Response:
    return _line(500, describe(error))


def _line(status: int, line: str) -> Response:
    """One line, where the clients of both forms look for it."""
    from starlette.responses import JSONResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"detail": line, "error": {"message": line, "type": kind}}, status)
