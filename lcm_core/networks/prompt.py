"""Prompts as people write them, by A1111's rules: weights, BREAK, changes at a step, alternation, AND.

| text | meaning |
|---|---|
| `(word:1.3)`, `(word)`, `[word]` | weight 1.3, 1.1, 1 / 1.1; nested ones multiply |
| `BREAK` | what follows is encoded in the next 75 tokens |
| `[a:b:0.5]`, `[a:3]`, `[a::3]` | from a to b at half of the steps; a from after step 3 on; a up to step 3 |
| `[a\\|b]` | in turn, from step to step |
| `a AND b :0.8` | two prompts, with weights 1 and 0.8 |
| `\\(`, `\\)`, `\\[`, `\\]`, `\\\\` | the character itself |

Brackets without a partner, and `[a:b]` without a number, are taken as A1111 takes them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from lcm_core.errors import InputError

Segment = tuple[str, float]
"""Words with their weight."""
BREAK: Segment = ("BREAK", 0.0)
"""A segment that ends a chunk; words have it for neither text nor weight."""
_ROUND, _SQUARE = 1.1, 1 / 1.1
_MOST_WEIGHT = 1000.0
_DEEPEST = 50  # brackets within brackets
_MOST_PARTS = 16  # joined by AND
_WEIGHT = re.compile(
    r"(?P<escaped>\\[\\()\[\]])|(?P<drop>\\)|(?P<open>[(\[])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])"
    r"|[^\\()\[\]:]+|:"
)
_BREAK = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\bAND\b")
_FACTOR = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")
_CHANGE = re.compile(r"\\.|[()\[\]:|]|[^\\()\[\]:|]+|\\$", re.DOTALL)
_NUMBER = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


def parse_weights(prompt: str) -> list[Segment]:
    """A prompt in words with weights, and `BREAK` where a chunk ends.

    Raises:
        InputError: a weight that no network survives.
    """
    found: list[list[str | float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        for entry in found[start:]:
            entry[1] = float(entry[1]) * factor

    for match in _WEIGHT.finditer(prompt):
        text, kind = match[0], match.lastgroup
        if kind in ("escaped", "drop"):
            found.append([text[1:], 1.0])
        elif kind == "open":
            opened[text].append(len(found))
            if len(opened[text]) > _DEEPEST:
                raise InputError(
                    f"the prompt has over {_DEEPEST} open brackets {text}; write \\{text} for the character"
                )
        elif kind == "weight" and opened["("]:
            multiply(opened["("].pop(), float(match["weight"]))
        elif text == ")" and opened["("]:
            multiply(opened["("].pop(), _ROUND)
        elif text == "]" and opened["["]:
            multiply(opened["["].pop(), _SQUARE)
        else:
            first, *rest = _BREAK.split(text)
            found.append([first.rstrip() if rest else first, 1.0])
            for number, part in enumerate(rest, 1):
                part = part.lstrip() if number == len(rest) else part.strip()
                found += [list(BREAK), [part, 1.0]]
    for start in opened["("]:
        multiply(start, _ROUND)
    for start in opened["["]:
        multiply(start, _SQUARE)
    return _joined([(str(text), float(weight)) for text, weight in found])


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one weight become one text, as the tokenizer must see their words together."""
    joined: list[Segment] = []
    for is_break, group in groupby(segments, key=lambda segment: segment == BREAK):
        if is_break:
            joined += group
            continue
        joined += [("".join(text for text, _ in same), weight) for weight, same in groupby(group, key=lambda s: s[1])]
    for text, weight in joined:
        if not abs(weight) <= _MOST_WEIGHT:
            raise InputError(f"the weight {weight:g} of {text[:40]!r} is out of range; 0.5 to 1.5 is usual")
    return joined or [("", 1.0)]


def split_parts(prompt: str) -> list[Segment]:
    """The prompts that AND joins, with their weights.

    Raises:
        InputError: too many, or weights that do not add up to anything.
    """
    parts: list[Segment] = []
    for text in _AND.split(prompt):
        words, _, factor = text.rpartition(":")
        weighted = _FACTOR.fullmatch(factor.strip())
        parts.append((words, float(weighted[0])) if weighted else (text, 1.0))
    if len(parts) == 1:
        return [(prompt, 1.0)]
    if len(parts) > _MOST_PARTS or not all(abs(weight) <= _MOST_WEIGHT for _, weight in parts):
        raise InputError(f"AND joins {len(parts)} prompts; use up to {_MOST_PARTS}, with weights around 1")
    return parts


# --- changes at a step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """`[a:b:0.5]` or `[a|b]`: texts and further changes."""

    parts: list[list[str | _Change]]
    when: str
    """The step of a change; empty for an alternation."""
    depth: int


@dataclass
class _Open:
    """A bracket that is not closed yet, by places in the list of what was read."""

    bracket: str
    start: int
    separators: list[int] = field(default_factory=list)


def texts_at_steps(prompt: str, steps: int, earlier: int | None = None) -> list[str]:
    """What a prompt says in each of the steps 1 .. `steps`.

    Args:
        prompt: as written.
        steps: of this pass.
        earlier: steps of the first pass, where this is the second: there, whole numbers count on from these, and
            fractions from 1, so that `[a:b:1.5]` changes half-way through it.

    Raises:
        InputError: changes within changes within changes, without end.
    """
    if "[" not in prompt:
        return [prompt] * steps
    items = _parse_changes(prompt)
    return [_text(items, step, steps, earlier) for step in range(1, steps + 1)]


def _parse_changes(prompt: str) -> list[str | _Change]:
    items: list[str | _Change] = []
    stack: list[_Open] = []
    for match in _CHANGE.finditer(prompt):
        text = match[0]
        if text in "([":
            stack.append(_Open(text, len(items)))
        elif text in ":|" and stack:
            stack[-1].separators.append(len(items))
        elif text in ")]":
            whole = stack and stack[-1].bracket == {")": "(", "]": "["}[text]
            closed = _close(items, stack.pop()) if whole else None
            if isinstance(closed, _Change):
                items.append(closed)
                continue
            if closed is None:  # no bracket is one in which another stands without its partner
                stack.clear()
        items.append(text)
    return items


def _close(items: list[str | _Change], group: _Open) -> _Change | str | None:
    """What a bracket that closes now stands for, taken out of `items`: a change, plain text, or no bracket at all."""
    kinds = {items[place] for place in group.separators}
    if group.bracket == "(":
        return "" if kinds <= {":"} and len(group.separators) < 2 else None
    if not kinds:
        return ""
    edges = [group.start, *group.separators, len(items)]
    parts = [items[start + 1 : end] for start, end in pairwise(edges)]
    when = ""
    if kinds == {":"} and len(parts) < 4:
        *parts, last = parts
        number = _NUMBER.fullmatch("".join(item if isinstance(item, str) else "[" for item in last))
        if number is None:
            return None
        when, parts = number[1], parts if len(parts) == 2 else [[], *parts]
    elif kinds != {"|"}:
        return None
    depth = 1 + max((item.depth for item in items[group.start :] if isinstance(item, _Change)), default=0)
    if depth > _DEEPEST:
        raise InputError(f"the prompt has changes [a:b:0.5] within each other {depth} deep; use up to {_DEEPEST}")
    del items[group.start :]
    return _Change(parts, when, depth)


def _text(items: Sequence[str | _Change], step: int, steps: int, earlier: int | None) -> str:
    texts = []
    for item in items:
        if isinstance(item, str):
            texts.append(item)
            continue
        if item.when:
            part = item.parts[0 if step <= _last_step(item.when, steps, earlier) else 1]
        else:
            part = item.parts[(step - 1) % len(item.parts)]
        texts.append(_text(part, step, steps, earlier))
    return "".join(texts)


def _last_step(when: str, steps: int, earlier: int | None) -> int:
    """The last step before a change: a number with a point is a share of the steps, another one counts them."""
    number = float(when)
    done = 0 if earlier is None else (1 if "." in when else earlier)
    last = (number - done) * (steps if "." in when else 1)
    return int(max(min(last, steps), -1))
