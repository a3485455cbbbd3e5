"""The report: complete, self-contained, safe against what users write, and true to the numbers."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from jinja2 import UndefinedError
from PIL import Image

from lcm_core.errors import InputError
from lcm_core.pipeline.image import save_image
from trainer.report.charts import Axis, Series, line_chart, log_ticks, round_ticks, smooth, thin
from trainer.report.page import read_run, render, write_report
from trainer.report.sections import duration, flatten, size
from trainer.report.tables import best_of, to_markdown
from trainer.report.template import fill

EVIL = "<script>alert('x')</script> & \"quotes\""
ROWS = [
    {"model": "teacher", "sampler": "euler", "steps": 4, "guidance_scale": 2.0, "fd": 70.2, "recall": 0.4},
    {"model": EVIL, "sampler": "lcm", "steps": 4, "guidance_scale": 1.0, "fd": 28.7, "recall": 0.6},
    {"model": EVIL, "sampler": "lcm", "steps": 8, "guidance_scale": 1.0, "fd": 27.0, "recall": 0.7},
]
VOID = {"meta", "img", "line", "circle", "polyline"}


class Page(HTMLParser):
    """What a page consists of; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self._open = [], [], [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def run(tmp_path):
    """A finished run's folder, with a hostile text in every place where a user's words can be."""
    folder = tmp_path / "my run"
    for role, colour in (("teacher", "red"), ("student", "blue")):
        for steps in (1, 2, 4, 8):
            picture = Image.new("RGB", (64, 64), colour)
            settings = {"prompt": EVIL, "seed": 3, "sampler": EVIL, "guidance_scale": 2.0}
            save_image(picture, folder / "samples" / f"{role}-{steps:02d}-000.png", settings)
    for step in range(100, 3001, 100):
        save_image(Image.new("RGB", (300, 200), "green"), folder / "previews" / f"step-{step:06d}.png")
    (folder / "run").mkdir()
    lines = [
        {"step": i, "loss": 1 / (i + 1), "learning_rate": 1e-3, "seconds": 0.5, "peak_memory": 3 * 2**30}
        for i in range(240)
    ]
    (folder / "run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run" / "machine.json").write_text(json.dumps({"processor": EVIL}))
    (folder / "results.json").write_text(json.dumps({"rows": ROWS, "remark": EVIL}))
    (folder / "skipped.json").write_text(json.dumps([[EVIL, "cannot be read"], ["b.jpg", EVIL]]))
    config = {"teacher": EVIL, "training": {"batch_size": 16, "learning_rate": 1e-4}, "student": {"layers": [EVIL]}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_page_asks_nobody_for_anything_and_runs_nothing(run):
    text = write_report(run).read_text()
    page = Page(text)
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert "url(" not in text
    assert "@import" not in text


def test_users_words_are_shown_as_they_are_and_are_never_markup(run):
    text = write_report(run).read_text()
    assert EVIL not in text
    words = "".join(Page(text).words)
    assert words.count(EVIL) >= 7  # prompt, sampler, model, remark, machine, skipped name, reason, settings


def test_a_prompt_with_a_script_is_text(tmp_path):
    """Also in attributes and in what is drawn: a page that is mailed must not run what somebody wrote as a prompt."""
    prompt = "<script>alert(1)</script>"
    save_image(Image.new("RGB", (8, 8)), tmp_path / "samples" / "student-04-000.png", {"prompt": prompt, "seed": 1})
    rows = [{"model": prompt, "sampler": "lcm", "steps": steps, "guidance_scale": 1.0, "fd": 2.0} for steps in (1, 4)]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    run = read_run(tmp_path)
    picture = replace(run.samples[0], role=prompt)
    text = render(replace(run, name=prompt, samples=[picture]))
    page = Page(text)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; <small>seed 1" in text
    assert "&amp;lt;" not in text  # escaped once: a chart is HTML already
    assert f"{prompt}, lcm" in page.words  # the chart's legend
    assert ("alt", f"{prompt}, 4 steps") in page.attributes


def test_a_name_that_a_template_lacks_is_an_error():
    """Else a renamed value would silently leave a gap in the page."""
    with pytest.raises(UndefinedError, match="teacher"):
        fill("report.html.jinja", name="run")


def test_the_page_holds_the_pictures_themselves(run):
    page = Page(write_report(run).read_text())
    pictures = [base64.b64decode(value.partition(",")[2]) for name, value in page.attributes if name == "src"]
    colours = [Image.open(io.BytesIO(data)).convert("RGB").getpixel((5, 5)) for data in pictures]
    assert colours[:8] == [(255, 0, 0)] * 4 + [(0, 0, 255)] * 4  # the teacher's row above the student's
    assert len(colours) == 8 + 12  # of 30 previews an even choice
    words = "".join(page.words)
    assert "step 100" in words
    assert "step 3,000" in words


def test_the_numbers_are_those_of_the_run(run):
    words = " ".join(Page(write_report(run).read_text()).words)
    assert "28.70" in words
    assert "teacher 70.20" in words
    assert "3,840" in words  # pictures: 240 steps of 16
    assert "32.00" in words  # a second
    assert "3.00 GiB" in words
    assert "120 s" not in words
    assert "2 min" in words
    assert "training" in words


def test_the_same_folder_gives_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path):
    (tmp_path / "config.json").write_text('{"teacher": "emoji"}')
    page = Page(write_report(tmp_path).read_text())
    assert "Settings" in page.words
    assert "Scores" not in page.words


@pytest.mark.parametrize("name", ["results.json", "run/log.jsonl", "skipped.json", "config.json"])
def test_a_damaged_file_is_named(run, name):
    (run / name).write_text('{"rows": [')
    with pytest.raises(InputError, match=re.escape(str(run / name))):
        write_report(run)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        write_report(tmp_path / "nowhere")


def test_points_are_drawn_where_the_axes_say():
    x, y = Axis([0, 10], 100, 200, log=False), Axis([1, 100], 300, 100, log=True)
    assert [x(0), x(5), x(10)] == [100, 150, 200]
    assert [y(1), y(10), y(100)] == pytest.approx([300, 200, 100])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.37, 0.91), (-3, 5), (1e-6, 2e-6), (0, 123456)])
def test_ticks_are_round_few_and_inside(low, high):
    ticks = round_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    steps = {f"{b - a:.6e}" for a, b in pairwise(ticks)}
    assert len(steps) == 1
    assert steps.pop()[:8] in ("1.000000", "2.000000", "5.000000")


def test_logarithmic_ticks_are_powers_of_ten_or_1_2_5():
    assert log_ticks(0.5, 2000) == [1, 10, 100, 1000]
    assert log_ticks(15, 250) == [20, 50, 100, 200]


def test_smoothing_keeps_straight_lines_straight_and_the_mean_of_noise():
    line = [(i, 2.0 * i) for i in range(100)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])
    noise = [(i, float(i % 2)) for i in range(1000)]
    assert all(0.45 < y < 0.55 for _, y in smooth(noise)[50:-50])


def test_thinning_keeps_peaks():
    points = [(i, 1.0) for i in range(10_000)]
    points[7777] = (7777, 99.0)
    thinned = thin(points)
    assert len(thinned) <= 800
    assert (7777, 99.0) in thinned


def test_a_chart_leaves_out_what_is_not_a_number_and_survives_a_single_value():
    chart = line_chart("t", [Series("a", [(0, float("nan")), (1, 2.0)], "student")], "x", "y", log_y=True)
    assert chart.count("polyline") == 1
    assert "nan" not in chart
    assert line_chart("t", [Series("a", [], "student")], "x", "y") == ""


def test_the_markdown_table_has_the_columns_that_are_used():
    lines = to_markdown(ROWS).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "model",
        "sampler",
        "steps",
        "guidance",
        "FD",
        "recall",
    ]
    assert len({len(line) for line in lines}) == 1
    assert "28.70" in lines[3]


def test_best_is_lowest_for_distances_and_highest_for_shares():
    assert best_of(ROWS, "fd") == 27.0
    assert best_of(ROWS, "recall") == 0.7
    assert best_of(ROWS, "steps") is None


def test_amounts_read_well():
    assert [duration(s) for s in (8.4, 754, 11_100)] == ["8 s", "13 min", "3 h 05 min"]
    assert [size(b) for b in (5 * 2**20, 3 * 2**29)] == ["5 MiB", "1.50 GiB"]
    assert flatten({"a": {"b": None, "c": [1, 2]}, "d": True}) == {"a.b": "none", "a.c": "1, 2", "d": "True"}
