"""What is written in several places must be the same in all of them."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import lcm_core

ROOT = Path(__file__).parents[1]


def test_the_version_differs_between_files() -> None:
    """ComfyUI's registry reads pyproject.toml, hosts that install nothing the package, papers the citation."""
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated is not None
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert stated[1] == lcm_core.__version__ == cited["version"]


def test_a_page_of_a_method_is_missing() -> None:
    """Every method has its page, and every page is in the menu."""
    from trainer.methods.config import METHOD_CONFIGS

    menu = (ROOT / "mkdocs.yml").read_text()
    for kind in METHOD_CONFIGS:
        page = ROOT / "docs" / "methods" / f"{kind}.md"
        assert f'"trainer/methods/{kind}.py"' in page.read_text()
        assert f"methods/{kind}.md" in menu
