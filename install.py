"""Run by AUTOMATIC1111's web UI and Forge before they start. Nothing is installed: what the web UI brings is enough.

It only says so early, and in one line, where the web UI's Python is too old for the extension.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 the web UI's Python is not this project's
    print(f"LCM Suite needs Python 3.10 or newer, and this web UI runs on {sys.version.split()[0]}; it will not load.")
