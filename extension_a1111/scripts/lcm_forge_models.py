"""Forge only: adds the sizes of exported models, such as the embedded one, to Forge's table of known models."""

from __future__ import annotations

from pathlib import Path

from modules import sd_models, shared

from extension_a1111.forge_models import find_entries

try:
    from huggingface_guess import model_list
except ImportError:  # A1111 reads sizes from a .yaml file
    model_list = None


def add_models() -> None:
    """Add what was exported. A script is loaded again by "Reload UI": what it added before is taken out first."""
    roots = {Path(root) for root in (sd_models.model_path, shared.cmd_opts.ckpt_dir) if root}
    model_list.models[:] = [known for known in model_list.models if not getattr(known, "lcm_suite", False)]
    for root in sorted(roots):
        for entry in find_entries(root):
            own = {
                "lcm_suite": True,
                "huggingface_repo": str(entry.folder),
                "unet_config": {**model_list.SD15.unet_config, **entry.match},
                "unet_extra_config": entry.extra,
            }
            model_list.models.insert(0, type("SD15OwnSize", (model_list.SD15,), own))


if model_list is not None:
    add_models()
