"""Odd JSON and damaged bytes, made from whole ones: random bytes alone would be refused at the first letter."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

_DEEP = "<deep>"
_DEEP_JSON = "[" * 100_000 + "]" * 100_000
LONE = "\ud800"
"""Half a character, which no encoding has."""
TEXTS = ["", "x", "1", "-1", "1e9", "nan", "../evil.txt", "/evil.txt", "\0", LONE, "a\nb", "漢字 🍕 عربي", "x" * 5000]
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 1000, 2**31, 2**63, 2**64, 10**400, 0.5, -0.5, 1e308, math.nan, math.inf]
odd: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, *NUMBERS, *TEXTS, [], {}, [1], ["x"], [[]], {"x": 1}, _DEEP]
).map(copy.deepcopy)  # what is put into one document is changed there, and must be whole in the next


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def json_like(draw: st.DrawFn, document: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A document with one to three things changed, and what was changed."""
    changed, notes = copy.deepcopy(document), []
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(changed))
        if not paths:
            break
        *way, key = draw(st.sampled_from(paths))
        inside: Any = changed
        for step in way:
            inside = inside[step]
        how = draw(st.sampled_from(["replace", "replace", "near", "remove", "wrap", "add"]))
        if how == "remove":
            del inside[key]
        elif how == "wrap":
            inside[key] = [inside[key]]
        elif how == "add" and isinstance(inside, dict):
            inside[draw(st.sampled_from(TEXTS))] = draw(odd)
        elif how == "near" and isinstance(inside[key], int):
            inside[key] += draw(st.sampled_from([-1, 1, 8, -inside[key], -2 * inside[key], inside[key]]))
        else:
            inside[key] = draw(odd)
        shown = inside[key] if how != "remove" and (isinstance(inside, list) or key in inside) else None
        notes.append(f"{how} {'.'.join(map(str, [*way, key]))} {shown!r:.60}")
    return changed, "; ".join(notes)


def dump(document: Any) -> bytes:
    """JSON, with NaN, with half characters and with what is nested too deep."""
    text = json.dumps(document)
    return text.replace(json.dumps(_DEEP), _DEEP_JSON).encode()


@st.composite
def damaged(draw: st.DrawFn, content: bytes, within: int | None = None) -> tuple[bytes, str]:
    """Bytes with one thing broken, among the first `within` of them, and what it is."""
    end = max(min(len(content), within or len(content)) - 1, 0)
    at = draw(st.integers(0, end))
    how = draw(st.sampled_from(["cut", "flip", "insert", "replace", "mark", "utf-16", "empty"]))
    byte = bytes([draw(st.integers(0, 255))])
    flipped = bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) if content else b""
    made = {
        "cut": content[:at],
        "flip": content[:at] + flipped + content[at + 1 :],
        "insert": content[:at] + byte + content[at:],
        "replace": content[:at] + byte * 4 + content[at + 4 :],
        "mark": b"\xef\xbb\xbf" + content,
        "utf-16": content[:1000].decode("latin-1").encode("utf-16"),
        "empty": b"",
    }
    return made[how], f"{how} at {at} {byte!r}"


@st.composite
def odd_json(draw: st.DrawFn, document: dict[str, Any]) -> tuple[bytes, str]:
    """The bytes of a JSON file with odd contents or, now and then, broken ones."""
    if draw(st.integers(0, 5)) == 0:
        return draw(damaged(dump(document)))
    changed, notes = draw(json_like(document))
    return dump(changed), notes
