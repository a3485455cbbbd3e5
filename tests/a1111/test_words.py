"""The languages: complete, without keys that nobody says, and with the same places to fill in."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from extension_a1111.recommendation import USUAL_LORA, Request, recommend, remarks
from extension_a1111.translation import Mistake, english, explain, speaker
from lcm_core.errors import InputError

ROOT = Path(__file__).parents[2]
LANGUAGES = sorted((ROOT / "localizations").glob("*.json"))
FILES = sorted((ROOT / "extension_a1111").rglob("*.py"))
NAMED = {"_HELP", "_NO_VIDEO_HELP", "NOTHING", "NOT_STARTED", "_LAST_LINE", "_NOT_COPIED", "_STATES", "words", "kind"}
"""Names of what is said later."""
SPOKEN = {"Button", "Mistake", "say", "OptionInfo"}
"""Calls whose texts the user reads."""
NAMES = {"LCM Suite", "TCD Suite"}
"""The same in all languages."""


def constants(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def is_spoken(call: ast.Call) -> bool:
    function = call.func.func if isinstance(call.func, ast.Call) else call.func  # host.say()("...")
    return getattr(function, "attr", getattr(function, "id", "")) in SPOKEN


def said_in(file: Path) -> set[str]:
    """Every text that a file shows: labels, buttons, what is given to `say`, and the texts of settings."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            found |= {text for word in node.keywords if word.arg == "label" for text in constants(word.value)}
            if is_spoken(node):
                found |= {text for argument in node.args[:2] for text in constants(argument)}
        elif isinstance(node, ast.Assign) and {getattr(target, "id", "") for target in node.targets} & NAMED:
            values = node.value.values if isinstance(node.value, ast.Dict) else [node.value]
            found |= {text for value in values for text in constants(value)}
        elif isinstance(node, ast.Tuple) and len(node.elts) == 5:  # a row of the settings: name, default, label, ...
            found |= constants(node.elts[2])
    return {text for text in found if " " in text or text.endswith(".")} - NAMES


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda file: file.stem)
def test_every_text_of_the_code_is_translated_and_no_other(language: Path) -> None:
    keys = set(json.loads(language.read_text(encoding="utf-8")))
    shown = set().union(*map(said_in, FILES))
    assert shown - keys == set()
    known = set().union(*(constants(ast.parse(file.read_text(encoding="utf-8"))) for file in FILES))
    assert keys - known == set()


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda file: file.stem)
def test_translations_fill_in_the_same_places(language: Path) -> None:
    for key, text in json.loads(language.read_text(encoding="utf-8")).items():
        assert sorted(re.findall(r"{\w+}", key)) == sorted(re.findall(r"{\w+}", text)), key
        assert text != key


def test_one_word_labels_that_the_host_has_too_are_not_ours() -> None:
    """A key translates the host's own label of that name as well, on every tab."""
    for language in LANGUAGES:
        keys = json.loads(language.read_text(encoding="utf-8"))
        assert {key for key in keys if " " not in key and not key.endswith(".")} == set()
        assert "Batch size" not in keys


def test_advice_is_said_in_the_language_of_the_page() -> None:
    said = remarks(Request("plain", "LCM Suite", 4, 1.0), recommend(4, 1.0, [None], None, USUAL_LORA), speaker("ko_KR"))
    assert len(said) == 1
    assert said[0].startswith("plain")
    assert re.search("[가-힣]", said[0])
    assert speaker("zh-Hans (Stable)")("Running.") != "Running."
    for unknown in ("None", "", None, "fr_FR"):
        assert speaker(unknown)("step {last}", last=3) == english("step {last}", last=3) == "step 3"


@pytest.mark.parametrize("language", LANGUAGES, ids=lambda file: file.stem)
def test_mistakes_are_said_in_the_language_of_the_page_and_what_others_say_is_quoted(language: Path) -> None:
    say = speaker(language.stem)
    mistake = Mistake("{path} does not exist; check the path.", path="/no/such")
    assert str(mistake) == explain(mistake) == "/no/such does not exist; check the path."
    assert re.findall(r"[A-Za-z]+", explain(mistake, say)) == ["no", "such"]
    told = explain(InputError("x.safetensors is cut off"), say)
    assert told.endswith("x.safetensors is cut off")
    assert not re.search(r"[A-Za-z]", told.removesuffix("x.safetensors is cut off"))


def test_every_mistake_that_a_page_shows_can_be_translated() -> None:
    """No file raises a sentence that is no key of the languages; `args` of a wrong form come from programs alone."""
    for file in FILES:
        raised = re.findall(r"raise (\w+)", file.read_text(encoding="utf-8"))
        programs = {"InputError"} if file.name == "options.py" else set()
        assert set(raised) <= {"Mistake", "not_written", "no_embedding"} | programs, file.name
