"""Our languages beside the hosts' own page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from webui_harness import ROOT, WebUI

pytestmark = pytest.mark.host


def test_no_key_translates_a_label_of_the_hosts_own(webui: WebUI) -> None:
    """A key translates every text of the page that is equal to it, whoever has put it there."""
    keys = json.loads((ROOT / "localizations" / "ko_KR.json").read_text(encoding="utf-8"))
    folders = [webui.checkout / name for name in ("modules", "scripts", "html", "javascript", "extensions-builtin")]
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".js", ".html")]
    source = "\n".join(Path(file).read_text(encoding="utf-8", errors="ignore") for file in files)
    assert "Hires. fix" in source
    assert [key for key in keys if f'"{key}"' in source or f"'{key}'" in source or f">{key}<" in source] == []
