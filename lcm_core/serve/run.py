"""Starting the server: models, socket, browser."""

from __future__ import annotations

import importlib
import socket
import sys
import webbrowser
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lcm_core.errors import InputError
from lcm_core.serve.app import build_app
from lcm_core.serve.fields import Limits
from lcm_core.serve.guard import LOOPBACK
from lcm_core.serve.painter import Painter
from lcm_core.serve.service import Service
from lcm_core.serve.shelf import Shelf, find_loras, find_models

_SECONDS_TO_CLOSE = 2


def serve(
    model: str = "emoji",
    models: Path | None = None,
    loras: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    browser: bool = True,
    limits: Limits | None = None,
    load_options: Mapping[str, Any] | None = None,
) -> None:
    """Serve until interrupted.

    Args:
        model: of requests that name none; loaded before the server answers.
        models, loras: folders with further .safetensors files (and diffusers folders) that clients may choose.
        host, port: where to listen; port 0 takes a free one.
        token: what every request has to give; required when `host` is not this machine alone.
        browser: open the page.
        limits: what one client may ask for.
        load_options: further options of `Pipeline.load`, e.g. `device`.

    Raises:
        InputError: the extra is not installed, no token for an open host, a port in use, an unusable model.
    """
    from lcm_core.pipeline import Pipeline

    _check_installed()
    if host not in LOOPBACK and not token:
        raise InputError(f"--host {host} lets other machines in; add --token with a long random text")
    limits = limits or Limits()
    listener = _listen(host, port)
    with listener:
        load = partial(Pipeline.load, **(load_options or {}))
        shelf = Shelf(find_models(model, models), find_loras(loras), load)
        service = Service(shelf, Painter(shelf, limits.waiting), limits)
        try:
            service.painter.warm_up()
            _run(service, listener, host, token, browser)
        finally:
            service.painter.close()


def _check_installed() -> None:
    for package in ("starlette", "uvicorn", "websockets"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"serve needs {package}, which is not here; pip install 'lcm-suite[serve]'") from error


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sends at once where TCP is said
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, sys.platform != "win32")
        listener.bind((host, port))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"cannot listen at {host}, port {port} ({error}); give another --host or --port") from error
    return listener


def _run(service: Service, listener: socket.socket, host: str, token: str | None, browser: bool) -> None:
    import uvicorn

    app = build_app(service, token, LOOPBACK if host in LOOPBACK else None)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # a page's token stands in the address of its websocket
        ws="websockets-sansio",
        ws_max_size=service.limits.body,
        ws_max_queue=4,
        ws_per_message_deflate=False,  # pictures are compressed already
        timeout_graceful_shutdown=_SECONDS_TO_CLOSE,
        server_header=False,
    )
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listener.getsockname()[1]}/" + (f"#token={token}" if token else "")
    print(f"{address}  (Ctrl-C ends)", flush=True)
    if browser:
        webbrowser.open(address)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn has closed everything by then
        print("ended", file=sys.stderr)
