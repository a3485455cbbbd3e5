"""What users type into a web UI, or paste into it, is read or refused in one line; no host is needed to try it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from extension_a1111.loras import find_loras, kind_of_name
from extension_a1111.options import LCM_SAMPLER, TCD_SAMPLER, read_options, reset_unnamed
from extension_a1111.travel import MAX_SEED, read_points
from lcm_core.errors import InputError
from tests.fuzz.mutations import TEXTS, odd

PARSES = settings(max_examples=300, derandomize=True, database=None, deadline=None)
_PIECES = ["a pear", "@", "@ 5", "@ -1", "@ " + "9" * 30, "@ " + "9" * 5000, "<lora:x:1>", "<lora:", ">", "AND", "\n"]
_LINES = st.lists(st.one_of(st.sampled_from([*_PIECES, *TEXTS]), st.text(max_size=20)), max_size=8).map(" ".join)
_ARGS = st.lists(odd, max_size=5)
_AXES = st.dictionaries(st.sampled_from(["gamma", "original_steps", "guidance"]), odd, max_size=3)


def read(parse: Callable[..., Any], *given: Any) -> Any:
    """What a parser makes of an input; None where it refuses it, in one line."""
    try:
        return parse(*given)
    except InputError as error:
        if "\n" in str(error):
            raise AssertionError("several lines") from error
        return None


@PARSES
@given(args=_ARGS, axes=_AXES)
@example(args=[True, 0.3, 10**400], axes={})
@example(args=[True, 0.3, float("inf")], axes={})
def test_any_args_are_options_or_refused(args: list[Any], axes: dict[str, Any]) -> None:
    options = read(read_options, args, axes)
    if options is None:
        return
    assert 0 <= options.gamma <= 1
    assert 1 <= options.original_steps <= 1000
    for sampler in (LCM_SAMPLER, TCD_SAMPLER):
        pasted: dict[str, Any] = dict(options.infotext(sampler))
        reset_unnamed("", pasted)
        assert pasted["LCM original steps"] == options.original_steps


@PARSES
@given(text=_LINES, prompt=_LINES, start_above=st.booleans())
@example(text="a @ " + "9" * 5000, prompt="", start_above=True)
@example(text="a @ -" + "9" * 30, prompt="", start_above=True)
def test_any_text_is_points_or_refused(text: str, prompt: str, start_above: bool) -> None:
    points = read(read_points, text, prompt, 7, start_above)
    if points is None:
        return
    assert len(points) >= 2
    assert all(abs(point.seed) <= MAX_SEED for point in points)


@PARSES
@given(prompt=_LINES)
def test_any_prompt_is_searched_for_loras(prompt: str) -> None:
    for lora in find_loras(prompt):
        assert lora.name in prompt
        kind_of_name(lora.name)
