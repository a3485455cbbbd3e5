"""Settings: what wins over what, and that every mistake is named."""

import argparse
import json
from contextlib import suppress
from dataclasses import fields, is_dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_core.errors import InputError
from trainer.cli.main import main
from trainer.config import DistillConfig
from trainer.continuing import check_same_run
from trainer.methods.config import Dmd2Config, LcdConfig, TcdConfig, config_class, defaults_of
from trainer.options import add_options, apply, describe_presets, list_options, resolve, to_dict
from trainer.presets import PRESETS
from trainer.setup import check
from trainer.toml import read_settings


def _resolve(*words):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return resolve(parser.parse_args([str(word) for word in words]))


def test_a_flag_wins_over_the_file_the_file_over_the_preset_the_preset_over_the_default(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"student": {"rank": 4}, "training": {"steps": 11, "batch_size": 3}}))
    default, preset = DistillConfig(), PRESETS["emoji"][1]
    config = _resolve("--preset", "emoji", "--config", file, "--steps", 7)
    assert config.training.steps == 7
    assert config.training.batch_size == 3
    assert config.student.rank == 4
    assert config.training.learning_rate == preset["training"]["learning_rate"] != default.training.learning_rate
    assert config.training.weight_decay == default.training.weight_decay


def test_every_kind_of_flag():
    words = "--teacher t --data d --method tcd --student full --flip --no-buckets --w-min 1 --target-modules to_q to_k"
    config = _resolve(*words.split(), "--preview-prompts", "a cat", "a dog, sitting")
    assert (config.teacher, config.data.path, config.method.kind, config.student.kind) == ("t", "d", "tcd", "full")
    assert (config.data.flip, config.data.buckets, config.method.w_min) == (True, False, 1.0)
    assert config.student.target_modules == ("to_q", "to_k")
    assert config.report.preview_prompts == ("a cat", "a dog, sitting")


def test_every_field_has_its_own_flag_and_a_help_text():
    options = list(list_options())
    flags = [option.flag for option in options]
    assert sorted(set(flags)) == sorted(flags)
    assert all(len(option.help) > 10 for option in options)
    sections = [f.name for f in fields(DistillConfig) if is_dataclass(getattr(DistillConfig(), f.name))]
    assert {option.section for option in options} == {"", *sections}


def test_the_resolved_settings_are_a_file_that_gives_them_again(tmp_path):
    config = _resolve("--preset", "emoji", "--target-modules", "to_q")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert _resolve("--config", tmp_path / "config.json") == config


def test_toml_files(tmp_path):
    pytest.importorskip("tomllib")
    (tmp_path / "a.toml").write_text(
        'teacher = "x"\n[training]\nlearning_rate = 1\n[student]\ntarget_modules = ["to_q"]'
    )
    config = _resolve("--config", tmp_path / "a.toml")
    assert (config.teacher, config.training.learning_rate, config.student.target_modules) == ("x", 1.0, ("to_q",))


def test_presets_are_printed_as_files_that_can_be_read(tmp_path, capsys):
    tomllib = pytest.importorskip("tomllib")
    assert main(["presets"]) == 0
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert blocks == describe_presets().split("\n\n")
    for block, (name, (_, content)) in zip(blocks, PRESETS.items(), strict=True):
        assert block.startswith(f"# {name}: ")
        assert tomllib.loads(block) == content


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    words = [] if name == "emoji" else ["--teacher", "t", "--data", "d", "--output", "o"]
    check(_resolve("--preset", name, *words))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"trainin": {}}, "unknown setting 'trainin'"),
        ({"training": {"lerning_rate": 1}}, r"'training.lerning_rate'; did you mean 'training.learning_rate'"),
        ({"rank": 8}, "'rank'; did you mean 'student.rank'"),
        ({"student": {"rank": "big"}}, r"student.rank = 'big' must be a whole number"),
        ({"student": {"rank": True}}, r"student.rank = True must be a whole number"),
        ({"student": 3}, r"'student' must hold settings"),
        ({"data": {"flip": 1}}, r"data.flip = 1 must be true or false"),
        ({"student": {"target_modules": "to_q"}}, r"student.target_modules = 'to_q' must be a list"),
    ],
)
def test_a_mistake_in_a_file_is_named(content, words):
    with pytest.raises(InputError, match=words):
        apply(DistillConfig(), content, "my.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--student", "both"], "unknown student 'both'"),
        (["--rank", "0"], "rank 0 is out of range"),
        (["--learning-rate", "nan"], "learning_rate nan"),
        (["--samples", "3"], "samples 3 is too few"),
        (["--output", ""], "no output was given"),
        (["--teacher", ""], "no teacher was given"),
        (["--prompts", "p.txt"], "both data and prompts"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_before_anything_is_loaded(words, message):
    with pytest.raises(InputError, match=message):
        check(_resolve("--preset", "emoji", *words))


def test_a_mistake_ends_the_command_with_code_2_and_one_line(tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"student": {"rang": 4}}')
    assert main(["distill", "--config", str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        main(["distill", "--stepz", "4"])
    message = capsys.readouterr().err
    assert "--stepz" in message
    assert message.count("\n") == 1


def test_a_flag_that_the_method_does_not_read_is_refused_with_its_name():
    with pytest.raises(InputError, match=r"the command line: phases is not read by method lcd, but by segmented, dmd2"):
        _resolve("--phases", 4)
    with pytest.raises(InputError, match=r"clean_share is not read by method dmd2, but by tcd"):
        _resolve("--method", "dmd2", "--clean-share", 0)
    assert _resolve("--method", "dmd2", "--phases", 2).method == Dmd2Config(phases=2)


def test_the_last_word_on_the_method_decides_what_all_others_may_set(tmp_path):
    """But a file's default of a setting that it does not read, here 4 phases, says nothing."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"method": {"kind": "lcd", "clean_share": 0.5, "w_min": 20.0, "phases": 4}}))
    config = _resolve("--config", file, "--method", "tcd", "--w-max", 30)
    assert config.method == TcdConfig(clean_share=0.5, w_min=20.0, w_max=30.0)
    with pytest.raises(InputError, match=r"mine.json: clean_share is not read by method segmented"):
        _resolve("--config", file, "--method", "segmented", "--w-max", 30)
    with pytest.raises(InputError, match="w_min=20, w_max=14 is no range"):
        _resolve("--config", file, "--method", "tcd")
    for kind in ("tdm", "flowmap"):  # which have other defaults than the first method with the same setting
        file.write_text(json.dumps({"method": {"kind": kind} | dict(defaults_of(config_class(kind)))}))
        assert _resolve("--config", file, "--method", "lcd").method == LcdConfig()


def test_a_run_is_not_continued_with_settings_of_another(tmp_path):
    before, now = to_dict(_resolve("--preset", "emoji")), to_dict(_resolve("--preset", "emoji", "--rank", 3))
    with pytest.raises(InputError, match=r"student.rank = 16, not 3"):
        check_same_run(before, now, tmp_path)
    longer = to_dict(_resolve("--preset", "emoji", "--steps", 9999, "--save-every", 5, "--preview-every", 7))
    check_same_run(before, longer, tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([option.name for option in list_options()])
SECTIONS = st.sampled_from(sorted({option.section for option in list_options()}))
FILES = st.dictionaries(SECTIONS | NAMES | st.text(max_size=8), st.dictionaries(NAMES, JSON, max_size=4) | JSON)


@settings(max_examples=150, deadline=None)
@given(FILES)
def test_any_content_of_a_file_is_taken_or_refused_as_input(content):
    with suppress(InputError):
        config = apply(DistillConfig(), content, "file")
        assert apply(DistillConfig(), to_dict(config), "again") == config or "nan" in str(config)
        check(config)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40), st.sampled_from([".json", ".toml"]))
def test_any_bytes_in_a_file_are_read_or_refused_as_input(tmp_path_factory, content, suffix):
    file = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    file.write_bytes(content)
    with suppress(InputError):
        assert isinstance(read_settings(file), dict)


def test_a_number_that_no_float_can_hold(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"method": {"w_min": 10**400}}))
    with pytest.raises(InputError, match=r"method\.w_min is too large"):
        _resolve("--config", tmp_path / "c.json")
