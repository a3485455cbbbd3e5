"""What the example workflows need beside the shipped models, where the host's own nodes list it."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from lcm_core.export.comfyui import PICTURES, draw_pictures
from lcm_core.files.safetensors import read_json
from lcm_core.pipeline.sources import CARD, MODELS

_EMOJI = MODELS / "emoji"


def register() -> None:
    """List the shipped ControlNets, and put two small pictures to start from into the host's input folder, the
    only one that its page lists."""
    folder_paths.add_model_folder_path("controlnet", str(_EMOJI / "control"))
    folder = Path(folder_paths.get_input_directory())
    if not all((folder / f"{name}.png").exists() for name in PICTURES):
        draw_pictures(folder, int(read_json(_EMOJI / CARD)["resolution"]))
