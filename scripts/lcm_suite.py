"""What AUTOMATIC1111's web UI and Forge load: it fetches the extension's real scripts from `extension_a1111/scripts`.

The host reads the root folder's `scripts` only. It looks for its classes in this module's globals.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from modules import errors, script_loading, scripts

_ROOT = Path(scripts.basedir())
if str(_ROOT) not in sys.path:
    sys.path.append(str(_ROOT))

_paths = sorted((_ROOT / "extension_a1111" / "scripts").glob("*.py"))
if find_spec("modules.sd_samplers_kdiffusion") is None:
    print("LCM Suite: this web UI has none of the samplers that the extension builds on; SD.Next has its own LCM")
    _paths = []

# Loaded by path and not imported: a reload of the page clears all callbacks, and an import would not set them again.
for _path in _paths:
    try:
        _module = script_loading.load_module(str(_path))
        globals().update({name: value for name, value in vars(_module).items() if not name.startswith("_")})
    except Exception:
        errors.report(f"LCM Suite: {_path.name} could not be loaded", exc_info=True)
