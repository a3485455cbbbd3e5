"""Weighted words as rows of 77 tokens, divided as A1111 divides them, with textual inversions in their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.networks.prompt import BREAK, Segment
from lcm_core.networks.tokenizer import Tokenizer

MOST_CHUNKS = 32
_COMMA = ",</w>"
_BACK_TO_COMMA = 20
"""Tokens: a phrase up to so long is not divided, but begins the next chunk."""


@dataclass
class Chunk:
    """Tokens between start and end, each with its weight."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    vectors: dict[int, Tensor] = field(default_factory=dict)
    """Place of a textual inversion's first token -> its vectors (N, D)."""

    @property
    def is_plain(self) -> bool:
        """Whether it is no more than words."""
        return not self.vectors and all(weight == 1 for weight in self.weights)


def split_chunks(
    tokenizer: Tokenizer, segments: Sequence[Segment], inversions: Mapping[tuple[int, ...], Tensor]
) -> list[Chunk]:
    """Divide weighted words into chunks.

    Args:
        tokenizer: of the encoder.
        segments: see `prompt.parse_weights`.
        inversions: tokens of an inversion's name -> its vectors (N, D).

    Raises:
        InputError: more than `MOST_CHUNKS`.
    """
    writer = _Writer(tokenizer.length - 2, tokenizer.token(_COMMA))
    for text, weight in segments:
        if (text, weight) == BREAK:
            writer.begin()
            continue
        ids = tokenizer.words(text)
        place = 0
        while place < len(ids):
            name = _name_at(ids, place, inversions)
            writer.make_room(ids[place])
            if name is None:
                writer.add([ids[place]], weight)
            else:
                writer.add_vectors(inversions[name], weight)
            place += len(name or "1")
    if len(writer.chunks) > 1 and not writer.chunk.ids:
        writer.chunks.pop()
    return writer.chunks


def _name_at(ids: Sequence[int], place: int, inversions: Mapping[tuple[int, ...], Any]) -> tuple[int, ...] | None:
    """The longest name of an inversion that begins here."""
    names = [name for name in inversions if tuple(ids[place : place + len(name)]) == name]
    return max(names, key=len, default=None)


class _Writer:
    """Fills one chunk after the other."""

    def __init__(self, room: int, comma: int | None) -> None:
        self.room, self.comma = room, comma
        self.chunks: list[Chunk] = []
        self.begin()

    def begin(self) -> None:
        if len(self.chunks) == MOST_CHUNKS:
            most = MOST_CHUNKS * self.room
            raise InputError(f"the prompt has more than {most} tokens (words, parts of them, or BREAK); shorten it")
        self.chunk = Chunk()
        self.chunks.append(self.chunk)
        self.last_comma: int | None = None

    def make_room(self, token: int) -> None:
        """Begin the next chunk where this one is full, with what follows the last comma where that is near."""
        full, back = self.chunk, self.last_comma
        if token == self.comma:
            self.last_comma = len(full.ids)
        elif len(full.ids) == self.room and back is not None and self.room - back <= _BACK_TO_COMMA:
            self.begin()
            # A1111 leaves inversions of the moved words behind, and so a hole; here they move along
            self.chunk.ids, full.ids = full.ids[back + 1 :], full.ids[: back + 1]
            self.chunk.weights, full.weights = full.weights[back + 1 :], full.weights[: back + 1]
            moved = {place: vectors for place, vectors in full.vectors.items() if place > back}
            full.vectors = {place: vectors for place, vectors in full.vectors.items() if place <= back}
            self.chunk.vectors = {place - back - 1: vectors for place, vectors in moved.items()}
        if len(self.chunk.ids) == self.room:
            self.begin()

    def add(self, ids: Sequence[int], weight: float) -> None:
        self.chunk.ids += ids
        self.chunk.weights += [weight] * len(ids)

    def add_vectors(self, vectors: Tensor, weight: float) -> None:
        if len(vectors) > self.room:
            raise InputError(f"a textual inversion has {len(vectors)} vectors; up to {self.room} fit")
        if len(self.chunk.ids) + len(vectors) > self.room:
            self.begin()
        self.chunk.vectors[len(self.chunk.ids)] = vectors
        self.add([0] * len(vectors), weight)
