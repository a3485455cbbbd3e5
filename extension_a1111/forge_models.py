"""Models of unusual size in Forge and Neo: what their tables must be told, read from the exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

CONFIGS = "*.config"
"""Folders that `python -m lcm_core export --to forge` puts beside a checkpoint."""


class Entry(NamedTuple):
    """One line for Forge's table: `match` is compared with what Forge counts in a file, `extra` it cannot count."""

    folder: Path
    match: dict[str, Any]
    extra: dict[str, Any]


def find_entries(root: Path) -> list[Entry]:
    """The models below `root` whose sizes Forge must be told; each pair of sizes once, since Forge sees nothing else.

    Folders that are not ours, or incomplete, are left out.
    """
    entries: dict[tuple[int, int], Entry] = {}
    for folder in sorted(root.rglob(CONFIGS)):
        try:
            config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
            sizes = config["cross_attention_dim"], config["block_out_channels"][0]
            heads = config["attention_head_dim"]  # diffusers' name is a mistake: it is their number
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if (folder / "model_index.json").is_file() and isinstance(heads, int):
            match = {"context_dim": sizes[0], "model_channels": sizes[1]}
            entries[sizes] = Entry(folder.resolve(), match, {"num_heads": heads, "num_head_channels": -1})
    return list(entries.values())


def replace_ours(table: list[Any], found: list[Any]) -> None:
    """Put classes at the front of a host's table, in place of those that an earlier load of the page put there."""
    table[:] = [*reversed(found), *(known for known in table if not getattr(known, "lcm_suite", False))]
