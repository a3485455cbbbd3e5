"""Forge and Neo only: adds the sizes of exported models, such as the embedded one, to the table of known models."""

from __future__ import annotations

from pathlib import Path

from modules import sd_models, shared

from extension_a1111.folders import CHECKPOINT_OPTIONS, option_folders
from extension_a1111.forge_models import find_entries, replace_ours

try:
    from backend.diffusion_engine.sd15 import StableDiffusion
    from huggingface_guess import model_list
except ImportError:  # A1111 and reForge read sizes from a .yaml file
    model_list = None


def add_models() -> None:
    """Add what was exported. A script is loaded again by "Reload UI": what it added before is taken out first."""
    roots = {Path(sd_models.model_path).absolute(), *option_folders(shared.cmd_opts, *CHECKPOINT_OPTIONS)}
    found = [
        type(
            "SD15OwnSize",
            (model_list.SD15,),
            {
                "lcm_suite": True,
                "huggingface_repo": str(entry.folder),
                "unet_config": {**model_list.SD15.unet_config, **entry.match},
                "unet_extra_config": entry.extra,
            },
        )
        for root in sorted(roots)
        for entry in find_entries(root)
    ]
    replace_ours(model_list.models, found)
    replace_ours(StableDiffusion.matched_guesses, found)  # Neo's loader asks for these exact types


if model_list is not None:
    add_models()
