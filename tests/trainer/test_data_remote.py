"""Tars in a store: the same pictures and captions as from the disk, in one pass, over connections that break."""

import http.server
import re
import threading
import uuid
from contextlib import contextmanager

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from lcm_core.errors import InputError
from trainer.data import remote, streams
from trainer.data.remote import RemoteStream, expand, find_remote
from trainer.data.streams import read_stream
from trainer.data.tars import read_tars

from .test_data_sources import picture, tar_of

FILES = {
    "cats/0001.jpg": picture(kind="JPEG"),
    "cats/0001.txt": " a  red\nsquare ",
    "0002.json": '{"text": "a green one", "cls": 3}',
    "0002.png": picture((0, 255, 0)),
    "0003.webp": picture((0, 0, 255), kind="WEBP"),
    "0004.txt": "a caption alone",
    "0005.svg": "<svg/>",
    "0006.png": picture(),
    "0006.json": "[]",
    "0007.png": b"no picture",
    "0007.txt": "broken",
    ".hidden.png": picture(),
}


@pytest.fixture
def store():
    """An address in memory, that nobody else has."""
    return f"memory://{uuid.uuid4().hex}"


def put(address, data):
    with fsspec.open(address, "wb") as stream:
        stream.write(data)


def read(tar, column=""):
    """What a tar in a store holds: {name: (caption, first pixel or why there is none)}, and what is skipped."""
    skipped = []
    with RemoteStream(tar) as stream:
        return described(read_stream(stream, tar.name, column, skipped)), skipped


def described(items):
    found = {}
    for item in items:
        try:
            shown = np.asarray(item.open().convert("RGB"))[0, 0].tolist()
        except InputError as error:
            shown = str(error)
        found[item.key] = item.caption, shown
    return found


@pytest.mark.parametrize("column", ["", "cls"])
def test_a_stream_gives_what_the_same_tar_on_the_disk_gives(store, tmp_path, column):
    (tmp_path / "a.tar").write_bytes(tar_of(FILES))
    put(f"{store}/a.tar", tar_of(FILES))
    local = read_tars([tmp_path / "a.tar"], column)
    expected = described(local.items), local.skipped
    assert read(*find_remote(f"{store}/a.tar"), column) == expected
    assert read(*find_remote(f"file://{tmp_path}/a.tar"), column) == expected
    assert len(expected[0]) >= 4
    assert len(expected[1]) >= 2


def test_a_picture_is_there_before_the_tar_was_read(store, monkeypatch):
    """Memory holds no more of it than that."""
    monkeypatch.setattr(streams, "_READ", 10240)
    put(f"{store}/a.tar", tar_of({f"{number:03d}.png": bytes(5000) for number in range(100)}))
    with RemoteStream(*find_remote(f"{store}/a.tar")) as stream:
        items = read_stream(stream, "a.tar", "", [])
        assert next(items).key == "a.tar/000.png"
        assert stream.position < 30_000
        assert len(list(items)) == 99


def test_a_damaged_tar_gives_the_samples_before_the_damage(store):
    data = tar_of({"1.png": picture(), "1.txt": "one", "2.png": picture(), "3.png": picture()})
    put(f"{store}/a.tar", data[: 512 * 7 + 10])  # in the midst of the third picture
    found, skipped = read(*find_remote(f"{store}/a.tar"))
    assert {name: caption for name, (caption, _) in found.items()} == {"a.tar/1.png": "one", "a.tar/2.png": ""}
    assert [name for name, _ in skipped] == ["a.tar"]
    assert skipped[0][1].startswith("the tar is damaged after 2 samples")


def test_samples_whose_members_lie_apart_are_refused(store):
    put(f"{store}/a.tar", tar_of({"1.png": picture(), "2.png": picture(), "1.txt": "late"}))
    with pytest.raises(InputError, match=r"a\.tar has the members of 1 apart from each other"):
        read(*find_remote(f"{store}/a.tar"))


def test_addresses_stand_for_tars(store):
    for name in ("b-09.tar", "b-10.tar", "x.tar", "note.txt"):
        put(f"{store}/{name}", tar_of({}))
    assert [tar.name for tar in find_remote(f"{store}/b-{{09..10}}.tar")] == ["b-09.tar", "b-10.tar"]
    assert [tar.name for tar in find_remote(f"{store}/{{x,b-10}}.tar")] == ["x.tar", "b-10.tar"]
    assert [tar.name for tar in find_remote(f"{store}/b*.tar")] == ["b-09.tar", "b-10.tar"]
    assert [tar.name for tar in find_remote(f"{store}/")] == ["b-09.tar", "b-10.tar", "x.tar"]
    assert [tar.name for tar in find_remote(store)] == ["b-09.tar", "b-10.tar", "x.tar"]
    assert expand("s3://b/{0..1}/{a,b}.tar") == [f"s3://b/{n}/{c}.tar" for n in (0, 1) for c in "ab"]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("/no.tar", "cannot list data memory://.*/no.tar"),
        ("/{1..x}.tar", r"\{1\.\.x\} is no range"),
        ("/{3..1}.tar", r"\{3\.\.1\} is no range"),
        ("/{000..999}-{000..999}-{0..9}.tar", "stands for 10,000,000 addresses"),
        ("/note.txt", r"note\.txt is no \.tar"),
        ("/empty*.tar", r"holds no \.tar"),
        ("/{a,b}/1.tar", r"has two tars that are called 1\.tar"),
    ],
)
def test_what_cannot_be_listed_is_named(store, end, message):
    for name in ("note.txt", "a/1.tar", "b/1.tar"):
        put(f"{store}/{name}", b"")
    with pytest.raises(InputError, match=message) as caught:
        find_remote(store + end)
    assert "\n" not in str(caught.value)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(known_implementations, "far", {"class": "no_such.Far", "err": "Install farfs"})
    with pytest.raises(InputError, match=r"data far://a\.tar needs a package .* \(Install farfs\)"):
        find_remote("far://a.tar")
    with pytest.raises(InputError, match=r"cannot list data nowhere://a\.tar"):
        find_remote("nowhere://a.tar")


class Connection:
    """To a file in memory; it breaks after so many bytes."""

    def __init__(self, stream, lasts):
        self.stream, self.left, self.seek = stream, lasts, stream.seek

    def read(self, size):
        if self.left <= 0:
            raise ConnectionResetError("reset by peer")
        data = self.stream.read(min(size, self.left))
        self.left -= len(data)
        return data

    def close(self):
        pass


class Breaking(MemoryFileSystem):
    """A store with such connections."""

    protocol = "breaking"
    lasts, opened = 3000, 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("breaking://"))

    def open(self, path, *args, **kwargs):
        type(self).opened += 1
        return Connection(super().open(path, *args, **kwargs), self.lasts)


@pytest.fixture
def breaking(store, monkeypatch):
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0))
    monkeypatch.setattr(Breaking, "opened", 0)
    put(f"{store}/a.tar", tar_of(FILES))
    return store.replace("memory", "breaking")


def test_a_connection_that_breaks_is_opened_again_where_it_broke(breaking, tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(FILES))
    local = read_tars([tmp_path / "a.tar"])
    assert read(*find_remote(f"{breaking}/a.tar")) == (described(local.items), local.skipped)
    assert Breaking.opened >= 4


def test_a_connection_that_always_breaks_ends_in_one_line(breaking, monkeypatch):
    monkeypatch.setattr(Breaking, "lasts", 0)
    tars = find_remote(f"{breaking}/a.tar")
    with pytest.raises(InputError, match=r"a\.tar broke 3 times at byte 0 \(reset by peer\)"):
        read(*tars)


class _Server(http.server.BaseHTTPRequestHandler):
    """Serves one file whatever is asked for. It cuts the first connection, and knows nothing of ranges."""

    content, cut, requests = b"", True, 0

    def do_HEAD(self):
        self._begin()

    def do_GET(self):
        type(self).requests += 1
        self._begin()
        first, type(self).cut = self.cut, False
        self.wfile.write(self.content[: len(self.content) // 2] if first else self.content)

    def _begin(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.send_header("ETag", '"one"')
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def serving(content):
    handler = type("Handler", (_Server,), {"content": content})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/a.tar", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_a_web_server_that_cuts_the_connection_and_knows_no_ranges(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0))
    content = tar_of({**FILES, **{f"1{number:03d}.png": picture() + bytes(3000) for number in range(200)}})
    (tmp_path / "a.tar").write_bytes(content)
    local = read_tars([tmp_path / "a.tar"])
    with serving(content) as (address, handler):
        [tar] = find_remote(address)
        assert re.fullmatch(rf'a\.tar {len(content)} ETag "one"', tar.identity)
        assert read(tar) == (described(local.items), local.skipped)
        assert handler.requests == 2
