"""What the tests of the server share."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lcm_core.serve.fields import Limits

LIMITS = Limits(side=128, steps=8, pictures=4, waiting=4, body=200_000, prompt=200, input_pixels=300 * 300)
SECONDS_TO_START, SECONDS_TO_END = 180, 30  # on a machine with other work
JSON = {"Content-Type": "application/json"}


def picture(colour: str = "red", size: tuple[int, int] = (64, 64)) -> str:
    """A PNG in base64."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def decoded(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def start(command: Sequence[str], output: Path, **options: Any) -> tuple[subprocess.Popen[bytes], str]:
    """A server's process and its address, once it says it in its `output`: a file, which never fills up as a pipe."""
    with output.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, **options)
    until = time.monotonic() + SECONDS_TO_START
    while not (found := re.search(r"http://\S+(?=/ )", output.read_text())):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise AssertionError(f"the server did not start: {output.read_text()}")
        time.sleep(0.05)
    return process, found[0]


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a server to end. One that does not is killed, and the test fails."""
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        raise AssertionError("the server runs on") from None
    finally:
        process.kill()


@contextlib.contextmanager
def hanging_clients(port: int) -> Iterator[None]:
    """A request that never ends, one whose pictures take long, and a page that answers nothing."""
    body = json.dumps({"prompt": "a", "steps": 50, "batch_size": 8}).encode()
    head = f"HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    page = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + "a" * 22
    with contextlib.ExitStack() as clients:
        for length in (len(body) + 100, len(body)):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            client.sendall(f"POST /sdapi/v1/txt2img {head}Content-Length: {length}\r\n\r\n".encode() + body)
        client = clients.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        client.sendall(f"GET /live {head}{page}==\r\n\r\n".encode())
        assert client.recv(12) == b"HTTP/1.1 101"
        yield
