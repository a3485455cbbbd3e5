"""`python -m lcm_core`, or by its path, `python path/to/lcm_core`; see `lcm_core.cli.main`."""

import sys
from pathlib import Path

if not __package__:  # by its path: an embedded Python, as of a portable ComfyUI, does not look into the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lcm_core.cli.main import start

if __name__ == "__main__":
    start()
