"""`python -m lcm_core`; see `lcm_core.cli.main`."""

import sys

from lcm_core.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
