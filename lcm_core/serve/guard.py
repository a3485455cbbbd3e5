"""Who may talk to the server: nobody without the token where there is one, and no web page from elsewhere."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
OPEN_PATHS = frozenset({"/", "/page.css", "/page.js", "/drawing.js"})
"""The page itself holds no secret; it asks for the token that stands behind the # of its address."""


class Guard:
    """ASGI middleware that refuses a request before the application sees it.

    A web page from elsewhere could send requests to a server on its visitor's own machine. Browsers name that page's
    address in `Origin`, which must therefore be ours; and a name that its owner points at 127.0.0.1 stands in `Host`,
    which must therefore be a name of this machine.

    Args:
        app: the application.
        token: what every request has to give, or None. As `Authorization: Bearer TOKEN`, as the password of a basic
            authorization, or, from a page's websocket, which can send no header, as `?token=`.
        hosts: names under which the server may be called; None allows all, which is safe with a token alone.
    """

    def __init__(self, app: App, token: str | None, hosts: frozenset[str] | None = LOOPBACK) -> None:
        self._app = app
        self._token = token
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it with 401 or 403."""
        refusal = None if scope["type"] not in ("http", "websocket") else self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, line = refusal
            body = json.dumps({"detail": line, "error": {"message": line, "type": "refused"}}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and _name(f"//{host}") not in self._hosts:
            return 403, "this server is called by a name that is not this machine's; use http://127.0.0.1 and its port"
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "a web page from elsewhere may not use this server; open the server's own page"
        is_open = scope["type"] == "http" and scope["path"] in OPEN_PATHS
        if self._token is None or is_open or _same(self._token, _given_token(scope, headers)):
            return None
        return 401, "the token is missing or wrong; send Authorization: Bearer TOKEN"


def _name(address: str) -> str | None:
    """The host's name without its port; None for nonsense."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _given_token(scope: Scope, headers: dict[str, str]) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    if kind.lower() == "bearer":
        return value.strip()
    query = parse_qs(scope["query_string"].decode("latin-1")) if scope["type"] == "websocket" else {}
    return query.get("token", [""])[0]


def _same(token: str, given: str) -> bool:
    """Compared in a time that does not tell how much of it was right."""
    return hmac.compare_digest(token.encode(), given.encode("utf-8", "replace"))
