"""README.md is true: every snippet runs, every link leads somewhere, and it stays short."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
MOST_LINES = 150
SET_UP = (
    'pip install -c constraints.txt . && python -m lcm_core generate "a panda, noto style" --steps 4 '
    "--output panda.png",
    'pip install -c constraints.txt -e ".[test]" && pytest',
)
"""The only set-up. A README in which these drift is the one mistake that every new user meets."""
NOT_RUN = (
    *("pip", "git", "docker", "accelerate"),
    *("python -m trainer recipe", "python -m trainer distill --teacher my.safetensors"),
)
"""What a block marked `no-run` may hold: it changes the machine, takes hours, or needs what only the reader has."""


@dataclass(frozen=True)
class Snippet:
    """A fenced block: the words behind the fence, the number of its first line, and its text."""

    info: str
    line: int
    text: str

    @property
    def commands(self) -> list[str]:
        """The block's commands, one for each line, continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def find_snippets(text: str) -> list[Snippet]:
    found = re.finditer(r"^```(\S[^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Snippet(m[1].strip(), text[: m.start()].count("\n") + 2, m[2]) for m in found]


def split_command(command: str) -> list[str]:
    """What is to be run of one line: its `&&` parts without a leading `pip install`, which made this environment."""
    return [part.strip() for part in command.split("&&") if not part.strip().startswith("pip install")]


def find_links(text: str) -> list[str]:
    """Targets of links and pictures that are neither in code nor on the web."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(<?([^)\s>]+)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    return [target for target in targets if not re.match(r"https?://|mailto:", target)]


def anchor(heading: str) -> str:
    """A heading's address on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


SNIPPETS = find_snippets(TEXT)


def test_readme_is_short() -> None:
    assert len(TEXT.splitlines()) <= MOST_LINES


def test_set_up_stands_at_the_top() -> None:
    """The two commands are the first two of all snippets, to the letter."""
    assert tuple(command for snippet in SNIPPETS for command in snippet.commands)[:2] == SET_UP


def test_every_fence_is_a_snippet() -> None:
    """A fence without a language would be run by no test."""
    assert len(re.findall(r"^\s*(?:```|~~~)", TEXT, re.MULTILINE)) == 2 * len(SNIPPETS)
    assert {snippet.info for snippet in SNIPPETS} <= {"bash", "bash no-run", "python"}


def test_what_is_not_run_is_allowed_not_to() -> None:
    """`no-run` must not hide a broken command."""
    commands = [command for snippet in SNIPPETS if snippet.info == "bash no-run" for command in snippet.commands]
    assert [command for command in commands if not command.startswith(tuple(f"{name} " for name in NOT_RUN))] == []


def test_what_is_run_can_be() -> None:
    """A command of another kind in a plain block would be skipped in silence."""
    commands = [command for snippet in SNIPPETS if snippet.info == "bash" for command in snippet.commands]
    parts = [part for command in commands for part in split_command(command)]
    assert parts
    assert [part for part in parts if not part.startswith("python -m ")] == []


def test_distilling_ones_own_teacher_names_a_preset() -> None:
    """Without one, the LoRA learns a mixture of guidances that it cannot tell apart."""
    commands = [command for snippet in SNIPPETS for command in snippet.commands if "trainer distill" in command]
    assert commands
    assert [command for command in commands if "--preset" not in command] == []


@pytest.mark.parametrize("target", sorted(set(find_links(TEXT))))
def test_link_leads_somewhere(target: str) -> None:
    path, _, place = target.partition("#")
    file = ROOT / path if path else README
    assert file.exists(), f"README.md links to {path}, which does not exist"
    if place:
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert place in [anchor(heading) for heading in headings]


def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom in one empty folder, as a reader would; each --output must be there afterwards."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for snippet in SNIPPETS:
        if snippet.info == "python":
            source = "\n" * (snippet.line - 1) + snippet.text  # so that a traceback names the README's own line
            exec(compile(source, str(README), "exec"), namespace)
        elif snippet.info == "bash":
            for command in snippet.commands:
                run_command(command, snippet.line, tmp_path)


def run_command(command: str, line: int, folder: Path) -> None:
    # The checkout comes first, whatever else is installed; Python's own -m would add the empty folder instead.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for part in split_command(command):
        words = [sys.executable, *shlex.split(part)[1:]]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"README.md:{line}: {part}\n{done.stdout}{done.stderr}"
        for flag, value in pairwise(words):
            if flag in ("--output", "--path"):
                assert (folder / value).exists(), f"README.md:{line}: {part}\nwrote no {value}"


def test_snippets_are_found() -> None:
    """The tests above would prove nothing if the reader of snippets saw none of them."""
    text = "# A\n```python\nx = 1\n```\n\n```bash no-run\n# why\npip install \\\n  a\n\ngit b\n```\n[a](b.md) `[c](d)`"
    python, bash = find_snippets(text)
    assert (python.info, python.line, python.text) == ("python", 3, "x = 1\n")
    assert bash.info == "bash no-run"
    assert bash.commands == ["pip install    a", "git b"]
    assert split_command("pip install . && python -m a b") == ["python -m a b"]
    assert find_links(text) == ["b.md"]


def test_failing_command_is_seen(tmp_path: Path) -> None:
    """A command that fails, or that writes nothing, must not pass."""
    with pytest.raises(AssertionError, match=r"README\.md:7: python -m lcm_core nonsense"):
        run_command("python -m lcm_core nonsense", 7, tmp_path)
    with pytest.raises(AssertionError, match=r"wrote no a\.png"):
        run_command("python -m this --output a.png", 1, tmp_path)
