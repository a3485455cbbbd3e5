"""`export --to a1111`: models for AUTOMATIC1111's web UI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lcm_core.errors import InputError
from lcm_core.export import webui
from lcm_core.export.webui import export_lora
from lcm_core.files.checkpoint import Component, ModelInfo

__all__ = ["check_host", "export_checkpoint", "export_lora"]


def check_host(folder: Path) -> None:
    """Refuse a folder that is not AUTOMATIC1111's web UI."""
    webui.check_webui(folder, forge=False)


def export_checkpoint(
    folder: Path,
    name: str,
    components: Mapping[str, Component],
    info: ModelInfo,
    tokenizer_files: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """See `webui.export_checkpoint`.

    Raises:
        InputError: also for SDXL with v-prediction, which this host takes for epsilon without a word.
    """
    if info.family == "sdxl" and info.prediction_type != "epsilon":
        raise InputError(
            f"{name} is SDXL with {info.prediction_type}, which A1111 would take for epsilon; export it "
            "--to single-file and put a copy of the host's sd_xl_base.yaml with VScaling beside it"
        )
    return webui.export_checkpoint(folder, name, components, info, tokenizer_files, metadata)
