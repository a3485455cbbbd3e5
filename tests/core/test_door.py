"""The repository's root as ComfyUI imports it: harmless without ComfyUI, and alert to packages of the same names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_OPEN = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
before = list(sys.path)
spec = spec_from_file_location("custom_nodes.lcm", {door!r}, submodule_search_locations=[{root!r}])
door = module_from_spec(spec)
spec.loader.exec_module(door)
"""


def _run(script: str, *paths: Path) -> str:
    code = _OPEN.format(door=str(ROOT / "__init__.py"), root=str(ROOT)) + script
    environment = {"PYTHONPATH": ":".join(map(str, paths))}
    command = [sys.executable, "-S", "-c", code]  # -S: no installed packages, so no ComfyUI, torch, or copy of ours
    result = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_opening_the_door_loads_nothing_and_goes_last() -> None:
    """Wrong when a mere look at the repository needs torch, or `import nodes` would no longer be ComfyUI's."""
    assert _run("print(sys.path == before + [door.__path__[0]], 'torch' in sys.modules)") == "True False"


def test_strangers_of_the_same_name_are_seen(tmp_path: Path) -> None:
    """Wrong when another package called `trainer` would be imported for ours without a word."""
    asked = "print(door.foreign_package('lcm_core'), door.foreign_package('trainer'))"
    assert _run(asked) == "None None"
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("")
    assert _run(asked, tmp_path) == f"None {tmp_path / 'trainer' / '__init__.py'}"
