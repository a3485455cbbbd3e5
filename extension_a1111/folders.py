"""The folders that a web UI was started with, in whichever form its command line has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHECKPOINT_OPTIONS = ("ckpt_dirs", "ckpt_dir")
LORA_OPTIONS = ("lora_dirs", "lora_dir")


def option_folders(cmd_opts: Any, *names: str) -> list[Path]:
    """The folders in the named options, each once and in order.

    A1111 and Forge have options of one folder (`--ckpt-dir`), Forge Neo has lists of them (`--ckpt-dirs`), and each
    host lacks those of the other.
    """
    found: dict[Path, None] = {}
    for name in names:
        value = getattr(cmd_opts, name, None) or []
        for folder in [value] if isinstance(value, (str, Path)) else value:
            found[Path(folder).absolute()] = None
    return list(found)
