"""ComfyUI's door: a clone of this repository in `custom_nodes` is the installation.

Importing this does nothing but make `lcm_core` and `trainer` importable; ComfyUI's entry point does the rest, so that
tools that merely come across this file (pytest does) need no ComfyUI.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WEB_DIRECTORY = "./web"
_ROOT = Path(__file__).resolve().parent

if str(_ROOT) not in map(str, sys.path):
    sys.path.append(str(_ROOT))  # at the end: `import nodes` must stay ComfyUI's own


def foreign_package(package: str) -> str | None:
    """Where `import package` would find another package than ours, or None."""
    spec = find_spec(package)
    found = Path(spec.origin).resolve() if spec and spec.origin else None
    return None if found and found.parents[1] == _ROOT else str(found)


async def comfy_entrypoint() -> Any:
    """Make the embedded model known to ComfyUI and hand over the nodes."""
    remedy = f"uninstall it from this Python, or link ours into it: pip install --no-deps -e {_ROOT}"
    if other := foreign_package("lcm_core"):
        raise ImportError(f"LCM Suite cannot start: another lcm_core is in the way ({other}); {remedy}")
    from comfy_api.latest import ComfyExtension

    from .nodes.examples import register as register_examples
    from .nodes.native import register
    from .nodes.stock import register as register_samplers

    if other := foreign_package("trainer"):
        logging.warning("LCM Suite has no LCM Distiller: another trainer is in the way (%s); %s", other, remedy)
        from .nodes.without_trainer import NODES
    else:
        from .nodes.catalogue import NODES
        from .nodes.panel import register as register_panel

        register_panel()

    class LCMSuite(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return NODES

    register()
    register_samplers()
    register_examples()
    return LCMSuite()
