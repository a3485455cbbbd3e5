"""`python -m lcm_core`, or by its path, `python path/to/lcm_core`; see `lcm_core.cli.main`."""

import sys
from pathlib import Path

if (
    not __package__
):  # by its path, since an embedded Python (a portable ComfyUI's) does not look into the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lcm_core.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
