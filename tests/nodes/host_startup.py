"""Runs inside a real ComfyUI's Python: what the suite adds to the host's start.

Usage: python host_startup.py CHECKOUT FOLDER. Prints seconds of CPU from the import to all nodes' inputs and outputs,
after all that the host itself imports before custom nodes.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

from host_start import load_suite, start

HOST = ("utils.extra_config", "execution", "server", "nodes", "comfy.sd", "comfy_api.latest")
"""In the order of main.py: later `utils` would be comfy/utils.py."""

if __name__ == "__main__":
    start(Path(sys.argv[1]), Path(sys.argv[2]))
    for name in HOST:
        importlib.import_module(name)
    before = time.process_time()
    load_suite()
    print(time.process_time() - before)
