"""Many pictures from one command: seeds, prompts from a file, wildcards, contact sheets."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from PIL import Image

from lcm_core.cli.main import main
from lcm_core.errors import InputError
from lcm_core.pipeline.image import read_settings
from lcm_core.pipeline.wildcards import fill_wildcards

CPU = ["--device", "cpu", "--dtype", "float32", "--steps", "1"]


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_listed_seeds_paint_something_else(emoji: str) -> None:
    argv = ["generate", "a cat", "--model", emoji, *CPU]
    assert main([*argv, "--seed", "7,2", "--output", "cats", "--sheet", "sheet.png"]) == 0
    assert names("cats") == ["a-cat-2.png", "a-cat-7.png"]
    assert main([*argv, "--seed", "2", "--output", "one.png"]) == 0
    assert Path("one.png").read_bytes() == Path("cats/a-cat-2.png").read_bytes()
    with Image.open("sheet.png") as sheet, Image.open("cats/a-cat-7.png") as first:
        assert sheet.width == 2 * (128 + 8) + 8
        assert sheet.crop((8, 8, 8 + first.width, 8 + first.height)).tobytes() == first.tobytes()


def test_a_file_of_prompts_with_wildcards(emoji: str) -> None:
    Path("prompts.txt").write_text("# two\na __colour__ cat\n\na dog\n")
    Path("words").mkdir()
    Path("words/colour.txt").write_text("red\ngreen\nblue\n__shade__ grey\n")
    Path("words/shade.txt").write_text("dark\nlight\n")
    argv = ["generate", "--prompts", "prompts.txt", "--wildcards", "words", "--model", emoji, *CPU]
    assert main([*argv, "--count", "2", "--output", "out"]) == 0
    prompts = {read_settings(path)["prompt"] for path in Path("out").iterdir()}
    filled = [fill_wildcards("a __colour__ cat", Path("words"), seed) for seed in (0, 1)]
    assert prompts == {*filled, "a dog"}
    assert len(names("out")) == 4
    assert len({fill_wildcards("__colour__", Path("words"), seed) for seed in range(50)}) == 5
    picture = next(path for path in Path("out").iterdir() if "cat" in path.name)
    assert main(["generate", "--from", str(picture), "--output", "again.png"]) == 0
    assert Path("again.png").read_bytes() == picture.read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "1,x"], "write e.g. 7, or 1,2,3"),
        (["--seed", "1,2", "--count", "2"], "--count goes with one seed"),
        (["--seed", "1,1"], "a seed twice"),
        (["--seed", "99999999999999999999"], "does not fit 64 bits"),
        (["--prompts", "none.txt"], "use one of them"),
        (["--wildcards", "."], "has no file colour.txt"),
        (["--sheet", "sheet.txt"], "no kind of picture"),
    ],
    ids=json.dumps,
)
def test_a_mistake_costs_one_line(
    emoji: str, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) if "1,x" in options else pytest.MonkeyPatch.context():
        assert main(["generate", "a __colour__ cat", "--model", emoji, *CPU, *options]) == 2
    assert words in capsys.readouterr().err
    assert not list(Path().glob("*.png"))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a//b"])
def test_a_wildcard_opens_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.txt").write_text("x\n")
    (tmp_path / "words").mkdir()
    with contextlib.suppress(InputError):
        assert fill_wildcards(f"__{name}__", tmp_path / "words", 0) == f"__{name}__"


def test_wildcards_that_lead_to_themselves_never_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("__b__\n")
    (tmp_path / "b.txt").write_text("__a__ __a__\n")
    (tmp_path / "c.txt").write_text("__c__\n")
    for name in ("__a__", "__c__"):
        with pytest.raises(InputError, match="lead back to themselves"):
            fill_wildcards(name, tmp_path, 0)
