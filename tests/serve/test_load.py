"""Many clients at once, a third of their requests malformed, two of them cut off half-way."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

PATHS = ("/sdapi/v1/txt2img", "/v1/images/generations")
GOOD = {"prompt": "a red apple", "steps": 1, "width": 64, "height": 64, "size": "64x64", "seed": 1}
BAD = ("{", "[]", '{"steps": 0}', '{"prompt": 1}', '{"width": 99999, "size": "9x9x9"}', "\0", '{"seed": "x"}')
CLIENTS = 20


def requests(client: int, count: int) -> Iterator[tuple[str, str]]:
    for number in range(client, count, CLIENTS):
        body = BAD[number % len(BAD)] if number % 3 == 0 else json.dumps(GOOD | {"seed": number})
        yield PATHS[number % 2], body


def ask(port: int, client: int, count: int, seen: Counter[int]) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    for path, body in requests(client, count):
        connection.request("POST", path, body.encode(), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        seen[answer.status] += 1
    connection.close()


def cut_off(port: int) -> None:
    """One client that promises more than it sends, and one that does not wait for its pictures."""
    body = json.dumps(GOOD | {"steps": 50, "batch_size": 8}).encode()
    for length in (len(body) + 100, len(body)):
        head = f"POST {PATHS[0]} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(head.encode() + body)


def memory(port: int) -> int:
    """Resident kilobytes of the process that listens at a port; 0 where the system does not say."""
    wanted = f"0100007F:{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {f"socket:[{row[9]}]" for row in rows if row[1] == wanted and row[3] == "0A"}
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(handle.readlink()) in inodes:
                status = (handle.parents[1] / "status").read_text()
                return int(status.partition("VmRSS:")[2].split()[0])
        except OSError:
            continue
    return 0


def run(server: str, count: int) -> Counter[int]:
    port = int(server.rpartition(":")[2])
    seen: Counter[int] = Counter()
    threads = [threading.Thread(target=ask, args=(port, client, count, seen), daemon=True) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    cut_off(port)
    for thread in threads:
        thread.join()
    return seen


def check(server: str, count: int) -> None:
    seen = run(server, count)
    assert sum(seen.values()) == count, f"clients got no answer: {seen}"
    assert set(seen) <= {200, 400, 429}, seen
    assert seen[400] == len([number for number in range(count) if number % 3 == 0])
    assert seen[200] > 0


def test_a_hundred_requests_of_twenty_clients_hang_or_fail(server: str) -> None:
    check(server, 100)


@pytest.mark.slow
def test_memory_grows_over_two_thousand_requests(server: str) -> None:
    port = int(server.rpartition(":")[2])
    check(server, 200)  # buffers reach their size
    before = memory(port)
    check(server, 2000)
    assert memory(port) <= before * 1.1 + 20_000, f"{before} kB became {memory(port)} kB"
