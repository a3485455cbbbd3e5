"""Tars in a store that fsspec reads, such as S3: which there are, and each of them as a stream from end to end."""

from __future__ import annotations

import io
import itertools
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lcm_core.errors import InputError

_AT_ONCE = 16  # tars that the store is asked about
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each new try to go on with a broken connection, which is given up after the last."""
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "content_md5", "Digest", "generation"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created"),
)
"""What stores call the sign of a file's content, or the time when it was changed; the best first."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 1_000_000  # addresses that braces may stand for


@dataclass(frozen=True)
class RemoteTar:
    """One tar in a store."""

    store: Any
    """fsspec's file system."""
    path: str
    """As the file system calls it."""
    size: int | None
    """Bytes; None where the store does not say."""
    version: str
    """Another one for other contents, as far as the store says."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def address(self) -> str:
        """Its path for the user."""
        return str(self.store.unstrip_protocol(self.path))

    @property
    def identity(self) -> str:
        """What its latents depend on: its name, which is in those of its pictures, and its contents. Where the store
        says nothing of these, its address stands for them."""
        return f"{self.name} {self.size} {self.version}" if self.version or self.size is not None else self.address


def is_remote(path: str) -> bool:
    """Whether the data is an address for fsspec; a path on this machine has no scheme."""
    return "://" in path


def find_remote(address: str) -> list[RemoteTar]:
    """The tars that an address stands for, in its order: `{000..099}` and `{a,b}` for each of them, `*` for what there
    is, a folder for its tars.

    Raises:
        InputError: nothing there, no tar, two of one name, a package that is missing, or a store that cannot be
            reached.
    """
    try:
        paths = [found for one in expand(address) for found in _list(one)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            tars = list(pool.map(_describe, paths))
    except ImportError as error:
        raise InputError(f"data {address} needs a package that is not installed ({error})") from error
    except InputError:
        raise
    except Exception as error:  # each store raises its own kinds
        raise InputError(f"cannot list data {address} ({_words(error)}); check the address and your access") from error
    if not tars:
        raise InputError(f"data {address} holds no .tar; pack the pictures in webdataset tars")
    names = [tar.name for tar in tars]
    if odd := next((name for name in names if not name.endswith(".tar")), None):
        raise InputError(f"data {address}: {odd} is no .tar; only webdataset tars are read from a store")
    if twice := next((name for name, number in Counter(names).items() if number > 1), None):
        raise InputError(f"data {address} has two tars that are called {twice}; give each a name of its own")
    return tars


def expand(address: str) -> list[str]:
    """The addresses that braces stand for: `{08..11}` for 08, 09, 10, 11, and `{a,b}` for a, b.

    Raises:
        InputError: braces with neither, a range the wrong way round, or too many addresses.
    """
    parts = _BRACES.split(address)  # every second one was in braces
    choices = [_choices(part, address) if number % 2 else [part] for number, part in enumerate(parts)]
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > _MOST:
        raise InputError(f"data {address} stands for {total:,} addresses; use at most {_MOST:,}")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str, address: str) -> list[str]:
    if found := _RANGE.fullmatch(inside):
        first, last = found.groups()
        if 0 <= int(last) - int(first) < _MOST:
            return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    elif "," in inside:
        return inside.split(",")
    raise InputError(f"data {address}: {{{inside}}} is no range; write {{000..099}}, or {{a,b}}")


def _list(address: str) -> list[tuple[Any, str]]:
    from fsspec.core import url_to_fs

    store, path = url_to_fs(address)
    # a web server would send all of a file to say whether it is a folder
    is_file = path.endswith(".tar") or "http" in store.protocol
    if "*" not in path and (is_file or not (path.endswith("/") or store.isdir(path))):
        return [(store, path)]
    pattern = path if "*" in path else f"{path.rstrip('/')}/*.tar"
    return [(store, str(found)) for found in sorted(store.glob(pattern))]


def _describe(place: tuple[Any, str]) -> RemoteTar:
    store, path = place
    info = store.info(path)
    version = next((f"{key} {info[key]}" for key in _VERSIONS if info.get(key)), "")
    size = info.get("size")
    return RemoteTar(store, path, int(size) if size is not None else None, version)


class RemoteStream(io.RawIOBase):
    """The bytes of a tar from its beginning to its end. Where a connection breaks, another one goes on from there.

    Raises:
        InputError: where it is read; the connection broke again and again, or the tar is not there.
    """

    def __init__(self, tar: RemoteTar) -> None:
        self.tar, self.position = tar, 0
        self._stream: Any = None

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Some of the next bytes, at most `size`; none at the end."""
        for wait in (*_WAITS, None):
            try:
                if self._stream is None:
                    self._stream = self._open()
                data = bytes(self._stream.read(size))
                if not data and self.tar.size is not None and self.position < self.tar.size:
                    raise EOFError(f"it ended after {self.position:,} of {self.tar.size:,} bytes")
            except (FileNotFoundError, PermissionError) as error:
                raise InputError(f"cannot read {self.tar.address} ({_words(error)}); check your access") from error
            except Exception as error:  # each store raises its own kinds
                self._drop()
                if wait is None:
                    raise InputError(
                        f"the connection to {self.tar.address} broke {len(_WAITS) + 1} times at byte "
                        f"{self.position:,} ({_words(error)}); the same command goes on with this tar"
                    ) from error
                time.sleep(wait)
            else:
                self.position += len(data)
                return data
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Let the connection go."""
        self._drop()
        super().close()

    def _open(self) -> Any:
        # a web server may not know of ranges, but always sends all from the beginning
        plain = "http" in self.tar.store.protocol
        stream = self.tar.store.open(self.tar.path, "rb", **({"block_size": 0} if plain else {}))
        if plain:
            left = self.position
            while left and (skipped := len(stream.read(min(left, 1 << 20)))):
                left -= skipped
        elif self.position:
            stream.seek(self.position)
        return stream

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        try:
            if stream is not None:
                stream.close()
        except Exception:  # a broken connection may not even close
            return


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
