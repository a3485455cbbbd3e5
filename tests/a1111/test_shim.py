"""The root's `scripts/lcm_suite.py`, run by path as the web UI runs it, with the web UI's own loader."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = {
    "modules/__init__.py": "",
    "modules/sd_samplers_kdiffusion.py": "",
    "modules/errors.py": "def report(message, exc_info=False):\n    print('report:', message)\n",
    "modules/scripts.py": "folder = ''\n\n\ndef basedir():\n    return folder\n",
    # as in the web UI
    "modules/script_loading.py": """
        import importlib.util
        import os

        loaded_scripts = {}

        def load_module(path):
            spec = importlib.util.spec_from_file_location(os.path.basename(path), path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            loaded_scripts[path] = module
            return module
    """,
}
LOAD = """
import sys
from modules import script_loading, scripts
scripts.folder = {folder!r}
before = list(sys.path)
for _ in range(2):  # the second time is "Reload UI"
    sys.path = [{folder!r}] + before
    shim = script_loading.load_module({folder!r} + "/scripts/lcm_suite.py")
    sys.path = before
    print(sorted(name for name, value in vars(shim).items() if isinstance(value, type) and name != "Path"))
"""


@pytest.fixture
def extension(tmp_path: Path) -> Path:
    """An extension folder with the real shim and scripts that say that they were run."""
    for name, text in HOST.items():
        file = tmp_path / "host" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    scripts = tmp_path / "suite" / "extension_a1111" / "scripts"
    scripts.mkdir(parents=True)
    (tmp_path / "suite" / "scripts").mkdir()
    (tmp_path / "suite" / "scripts" / "lcm_suite.py").write_bytes((ROOT / "scripts" / "lcm_suite.py").read_bytes())
    (tmp_path / "suite" / "extension_a1111" / "helper.py").write_text("print('helper')\n")
    (scripts / "a.py").write_text("import extension_a1111.helper\nprint('a')\nclass A:\n    pass\n")
    (scripts / "broken.py").write_text("raise RuntimeError\n")
    (scripts / "c.py").write_text("print('c')\nclass C:\n    pass\n")
    return tmp_path / "suite"


def load_twice(extension: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOAD.format(folder=str(extension))]
    return subprocess.run(command, cwd=extension.parent / "host", capture_output=True, text=True, check=False)


def test_scripts_are_run_at_every_reload_and_a_broken_one_costs_only_itself(extension: Path) -> None:
    """Callbacks are cleared by a reload, so the scripts must run again; their helpers need not."""
    result = load_twice(extension)
    once = ["a", "report: LCM Suite: broken.py could not be loaded", "c", "['A', 'C']"]
    assert result.stdout.splitlines() == ["helper", *once, *once], result.stderr


def test_a_web_ui_without_k_diffusion_is_told_in_one_line(extension: Path) -> None:
    """SD.Next, which paints with diffusers: three tracebacks otherwise, and a page without its own LCM being named."""
    (extension.parent / "host" / "modules" / "sd_samplers_kdiffusion.py").unlink()
    result = load_twice(extension)
    lines = result.stdout.splitlines()
    assert len(lines) == 4, result.stderr
    assert lines[0] == lines[2]
    assert lines[0].startswith("LCM Suite: this web UI has none of the samplers")
    assert lines[1] == lines[3] == "[]"


def test_nothing_else_lies_in_the_folder_that_the_host_reads() -> None:
    assert [file.name for file in (ROOT / "scripts").iterdir() if file.suffix == ".py"] == ["lcm_suite.py"]


def test_install_changes_no_package() -> None:
    """It runs in the web UI's own Python; a pip there could break the web UI."""
    blocked = "import sys, subprocess, runpy\nsubprocess.Popen = subprocess.run = None\nsys.modules['pip'] = None\n"
    script = f"{blocked}runpy.run_path({str(ROOT / 'install.py')!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")


def test_metadata_names_the_extension_and_languages_are_complete() -> None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "metadata.ini")
    assert metadata["Extension"]["Name"] == "lcm-suite"
    words = {file.stem: json.loads(file.read_text("utf-8")) for file in (ROOT / "localizations").glob("*.json")}
    assert set(words) == {"ja_JP", "ko_KR", "zh_CN"}
    assert len({frozenset(translation) for translation in words.values()}) == 1
    assert all(text for translation in words.values() for text in translation.values())


def test_plain_modules_import_without_a_web_ui_or_big_libraries() -> None:
    """The web UI's Python has torch, safetensors and einops; `host`, `sampler` and `advice` need the web UI itself."""
    with_host = {"host", "sampler", "advice"}
    names = [f.stem for f in (ROOT / "extension_a1111").glob("*.py") if f.stem not in with_host | {"__init__"}]
    blocked = ["diffusers", "transformers", "kornia", "accelerate", "peft", "gradio", "modules", "trainer", "nodes"]
    script = f"""
import sys, importlib
for name in {blocked!r}:
    sys.modules[name] = None
for name in {names!r}:
    importlib.import_module("extension_a1111." + name)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")
