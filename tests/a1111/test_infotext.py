"""Options from the accordion, the API and the plot; what of them the infotext says."""

from __future__ import annotations

import pytest

from extension_a1111.options import Options, read_options, reset_unnamed
from lcm_core.errors import InputError


def test_the_infotext_names_what_the_sampler_reads_defaults_too() -> None:
    """A default that is not named would leave the slider of an earlier picture where it is."""
    assert read_options([]) == Options()
    assert Options().infotext("LCM Suite") == {"LCM original steps": 50}
    assert Options().infotext("TCD Suite") == {"TCD gamma": 0.3, "LCM original steps": 50}
    assert Options(original_steps=100).infotext("LCM Suite") == {"LCM original steps": 100}


def test_pasting_resets_what_the_picture_does_not_name() -> None:
    """A picture of an earlier version, or of another sampler, names none of these."""
    params = {"Steps": "4", "TCD gamma": "0.7"}
    reset_unnamed("", params)
    assert params == {"Steps": "4", "TCD gamma": "0.7", "LCM original steps": 50, "LCM Suite auto": False}


@pytest.mark.parametrize("sampler", ["LCM Suite", "TCD Suite"])
def test_pasting_resets_the_hosts_settings_that_change_our_pictures(sampler: str) -> None:
    """A picture made without ENSD does not name it, and the page may have it on."""
    params: dict[str, object] = {"Sampler": sampler, "NGMS": "3"}
    reset_unnamed("", params, skipped=["Skip Early CFG"])
    assert params["ENSD"] == 0
    assert params["NGMS"] == "3"
    assert params["Noise multiplier"] == 1
    assert "Skip Early CFG" not in params
    other: dict[str, object] = {"Sampler": "Euler a"}
    reset_unnamed("", other)
    assert "ENSD" not in other


def test_clip_skip_is_read_where_the_host_leaves_it_out() -> None:
    """Neo drops it from what it has read; elsewhere the host's own reading stays."""
    text = "a cat, Clip skip: 3\nSteps: 4, Sampler: LCM Suite, Clip skip: 2, RNG: CPU"
    for read, wanted in (({}, "2"), ({"Clip skip": "1"}, "1")):
        params: dict[str, object] = {"Sampler": "LCM Suite", **read}
        reset_unnamed(text, params)
        assert params["Clip skip"] == wanted


def test_args_in_order_and_axes_above_them() -> None:
    assert read_options([True, "0.5", 40.0]) == Options(True, 0.5, 40)
    assert read_options([False, None]) == Options()
    assert read_options([False, 0.5], {"gamma": 1.0, "guidance": 9.0}) == Options(False, 1.0, 50, 9.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([False, 2], "TCD gamma 2.0 is out of range; use 0 to 1"),
        ([False, float("nan")], "TCD gamma nan is out of range"),
        ([False, 0.3, 0], "LCM original steps 0 is out of range; use 1 to 1000"),
        ([False, "much"], "LCM Suite's args .* must be auto, gamma, original_steps: could not convert"),
        ([False, [1]], "must be auto, gamma, original_steps"),
        ([1, 2, 3, 4], "LCM Suite was given 4 args; give at most 3: auto, gamma, original_steps"),
    ],
)
def test_bad_args_are_named(args: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_options(args)
