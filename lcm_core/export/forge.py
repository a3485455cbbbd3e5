"""`export --to forge`: models for Forge.

Forge builds only the sizes that it knows. For a model of another size, such as the embedded one, it needs the LCM Suite
extension, which adds the sizes in `NAME.config` to Forge's list when it starts.
"""

from __future__ import annotations

from pathlib import Path

from lcm_core.export.webui import check_webui, export_checkpoint, export_lora

__all__ = ["check_host", "export_checkpoint", "export_lora"]


def check_host(folder: Path) -> None:
    """Refuse a folder that is not Forge."""
    check_webui(folder, forge=True)
