"""Makes a process a ComfyUI without its server, for the scripts that tests run in a host's Python. Imported first."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def start(checkout: Path, folder: Path) -> None:
    """Let the host's modules be imported as under its main.py, on the CPU, with its data in a folder."""
    sys.argv = ["main.py", "--cpu", "--base-directory", str(folder)]
    sys.path[0] = str(checkout)  # and not this file's folder

    import comfy.options

    comfy.options.enable_args_parsing()
    sys.path += [str(Path(__file__).parent), str(ROOT)]  # behind the host's, as the custom node puts itself


def load_suite() -> dict[str, Any]:
    """Every node class by its id, loaded as ComfyUI loads a custom node."""
    spec = importlib.util.spec_from_file_location("suite", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["suite"] = module
    spec.loader.exec_module(module)

    async def load() -> list[Any]:
        return await (await module.comfy_entrypoint()).get_node_list()

    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(load())}
