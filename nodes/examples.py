"""What the example workflows need beside the shipped models, where the host's own nodes list it."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from lcm_core.export.comfyui import draw_pictures
from lcm_core.pipeline.sources import MODELS

_EMOJI = MODELS / "emoji"
_SIZE = 64  # pixels of the embedded model's pictures


def register() -> None:
    """List the shipped ControlNets, and put the pictures that the examples start from into the host's temporary folder,
    which it empties by itself: no folder of the user's is written to."""
    folder_paths.add_model_folder_path("controlnet", str(_EMOJI / "control"))
    draw_pictures(Path(folder_paths.get_temp_directory()), _SIZE)
