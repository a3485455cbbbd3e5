"""Versions of a caption with its tags, which commas part, in other orders."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from trainer.data.settings import DataConfig


def write_versions(captions: Sequence[str], config: DataConfig) -> list[str]:
    """All versions of all captions, those of one beside each other; the first of each is as it was written."""
    return [
        shuffle_tags(caption, version, config.keep_tags)
        for caption in captions
        for version in range(config.caption_versions)
    ]


def shuffle_tags(caption: str, version: int, kept: int = 0) -> str:
    """A caption with the tags behind the first `kept` in an order that depends on it and on the version alone."""
    tags = [tag.strip() for tag in caption.split(",")]
    if version == 0 or len(tags) < kept + 2:
        return caption
    moved = tags[kept:]
    random.Random(hashlib.sha256(f"{version}/{caption}".encode()).digest()).shuffle(moved)
    return ", ".join([*tags[:kept], *moved])
