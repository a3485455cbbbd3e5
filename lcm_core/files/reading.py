"""Files from outside: only plain ones are opened, and JSON is read within limits of size and depth."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from lcm_core.errors import InputError

JSON_LIMIT = 16 * 2**20
"""Bytes of one JSON text. Parsed it may take thirty times as much memory; the longest of real use have a few MB."""
DEPTH_LIMIT = 32
"""Brackets within brackets; real files have 8 at most."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a plain file, or a link to one, for reading.

    Raises:
        InputError: it is missing, may not be read, or is a folder, a device or a pipe, which might have no end.
    """
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISREG(kind):
            return open(path, "rb")
    except FileNotFoundError as error:
        raise InputError(f"{os.fspath(path)} does not exist; check the path") from error
    except OSError as error:
        raise InputError(f"cannot read {os.fspath(path)}: {error.strerror}; check the path") from error
    except ValueError as error:  # a null byte
        raise InputError(f"{os.fspath(path)!r} is no file name ({error}); check the path") from error
    what = "a folder" if stat.S_ISDIR(kind) else "a device or a pipe"
    raise InputError(f"{os.fspath(path)} is {what}, not a file; give a plain file")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a plain UTF-8 file of at most `JSON_LIMIT` bytes.

    Raises:
        InputError: as `open_file`; or too large, or not UTF-8.
    """
    with open_file(path) as stream:
        data = stream.read(JSON_LIMIT + 1)
    try:
        return _decode(data)
    except ValueError as error:
        raise InputError(f"{os.fspath(path)} is not a readable text ({error}); get it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a plain file.

    Raises:
        InputError: as `open_file`; or not a JSON object, too large, or nested too deep.
    """
    with open_file(path) as stream:
        data = stream.read(JSON_LIMIT + 1)
    return parse_json(data, os.fspath(path))


def parse_json(text: str | bytes, name: str, remedy: str = "get it again") -> dict[str, Any]:
    """A JSON object from a text.

    Args:
        text: UTF-8 where it is bytes.
        name: what the text is and where it came from, for the message.
        remedy: what to do when it is broken.

    Raises:
        InputError: no JSON object, too large, nested too deep, or with half a character in it.
    """
    try:
        if len(text) > JSON_LIMIT:
            raise ValueError(f"longer than {JSON_LIMIT:,} bytes")
        decoded = _decode(text) if isinstance(text, bytes) else text
        content = json.loads(decoded)
        _check_depth(content)
        if _SURROGATE.search(decoded):
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise InputError(f"{name} is not readable JSON (nested too deep); {remedy}") from None
    except ValueError as error:
        raise InputError(f"{name} is not readable JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{name} holds no JSON object; {remedy}")
    return content


def check_text(what: str, text: str) -> None:
    """Refuse a text that no file can hold: with a null byte, or with half a character (a lone surrogate).

    Raises:
        InputError: names `what` it is.
    """
    if "\0" in text:
        raise InputError(f"the {what} {text[:60]!r} holds a null byte; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the {what} {text[:60]!r} is no valid text ({error.reason}); write it as UTF-8") from None


def is_plain_name(name: object) -> bool:
    """Whether a name from a file is that of a file in the same folder, on every system: no way out of the folder."""
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w .()+=@,-]*", name) is not None and name[-1] not in ". "


def _decode(data: bytes) -> str:
    if len(data) > JSON_LIMIT:
        raise ValueError(f"longer than {JSON_LIMIT:,} bytes")
    return data.decode("utf-8-sig")


def _check_depth(content: object) -> None:
    level = [content]
    for _ in range(DEPTH_LIMIT + 1):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [child for values in inner for child in values if isinstance(child, (dict, list))]
        if not level:
            return
    raise ValueError("nested too deep")
