"""What the tab "LCM Distil" shows of a run: its state, and the curve of its loss."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from extension_a1111.distil_page import render
from extension_a1111.distil_status import Status, read_losses


def test_the_page_escapes_what_it_did_not_write() -> None:
    page = render(Status("failed", "<i>", message="<script>alert(1)</script>"))
    assert "<script" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;" in page


def test_the_curve_runs_from_the_first_to_the_last_step_within_its_frame() -> None:
    page = render(Status("running", "red", losses=[(10, 4.0), (20, 1.0), (30, 2.0)]))
    points = re.search(r'points="([^"]*)"', page)
    assert points is not None
    assert points[1] == "0.0,0.0 320.0,160.0 640.0,106.7"
    assert "steps 10 to 30" in page


def test_a_long_log_is_thinned_by_means_and_half_a_line_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": step % 2}) for step in range(1, 1001)]
    log.write_text("\n".join(lines) + '\n{"step": 1001, "lo')
    losses = read_losses(log)
    assert len(losses) == 334
    assert losses[0] == (3, pytest.approx(2 / 3))
    assert losses[-1][0] == 1000
    assert read_losses(tmp_path / "none") == []
