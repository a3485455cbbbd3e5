"""Command lines that are odd: prompts, names of outputs, numbers."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.guards import Case
from tests.fuzz.mutations import LONE, TEXTS
from tests.fuzz.training import picture

_SYNTAX = [
    *("(a:1.3)", "(a:nan)", "(a:1e308)", "(a:" + "9" * 5000 + ")", "(" * 1000, "[" * 1000 + "]" * 1000, "[a|b]", "[a|"),
    *(
        "[a:b:0.5]",
        "[a:b:-1]",
        "[a::" + "9" * 30 + "]",
        "a AND b",
        "a AND b :nan",
        "AND",
        "BREAK",
        "a BREAK",
        "__words__",
    ),
    *("__words__", "__../words__", "\\(a\\)", "(a:)", "[:::]", "a :-1e308 AND b", "__" * 1000),
]
_PROMPTS = st.one_of(
    st.sampled_from(_SYNTAX),
    st.sampled_from(
        [*TEXTS, "word " * 3000, "a" * 100_000, f"a {LONE}", "<lora:x:1>", "-", "@", "cat@5", "cat@" + "9" * 30]
    ),
    st.text(st.characters(codec="utf-8"), max_size=40),  # every script
)
_OUTPUTS = st.sampled_from(
    [
        *("a.png", "a.jpg", "a.webp", "a.PNG", "a.gif", "a", "a.tar.gz", ".png", "...", "", " ", "a b.png"),
        *("x" * 300 + ".png", "é" * 200 + ".png", "x" * 5000, "a.png/b.png", "deep/er/a.png", "\0.png", f"{LONE}.png"),
        *("漢字.png", "taken", "taken/a.png", "taken.png", "taken.png/a.png", "/dev/null"),
        *("a\nb.png", "-.png", "con.png", "a:b.png", "~/a.png", "a." + "x" * 300),
    ]
)
_INTEGERS = ["0", "1", "-1", "2", "51", "1001", "99999999999999999999", "1.5", "nan", "", "x", "\uff11", "1_0"]
_FLOATS = [*_INTEGERS, "0.5", "-0.5", "inf", "-inf", "1e308", "1e-300", "100", "101"]
_OPTIONS = {
    "--steps": _INTEGERS,
    "--seed": [*_INTEGERS, str(2**63), str(-(2**63)), str(2**64), "1,2", "1,", ",", "1,1", f"1,{2**64}"],
    "--guidance": _FLOATS,
    "--nag": _FLOATS,
    "--nag-tau": _FLOATS,
    "--nag-alpha": _FLOATS,
    "--size": ["64", "64x64", "65", "0", "-64", "64x", "8193", "x", "1e3", "64x64x64", "9" * 30, "32", "8"],
    "--sampler": ["lcm", "tcd", "euler", "dpmpp_2m", "dpm_2m", "", "LCM", "x"],
    "--original-steps": _INTEGERS,
    "--timesteps": ["999", "999,499", "499,999", "1000", "-1", "999,999", "", ",", "1.5", "9" * 30, "0"],
    "--gamma": _FLOATS,
    "--strength": _FLOATS,
    "--upscale": ["1", "2", "0", "-1", "nan", "inf", "1.01", "5"],
    "--upscale-strength": _FLOATS,
    "--device": ["cpu", "cuda", "cuda:99", "meta", "mps", "x", "", "cpu:1", "cpu:99999999999"],
    "--dtype": ["float32", "float16", "fp16", "bfloat16", "int8", "", "x"],
    "--vae-dtype": ["float32", "float16", "x"],
    "--unet": ["lcm", "teacher", "x"],
    "--lora": ["INPUTS/file.png", "INPUTS/folder", "x", "", ":", ":1", "x:nan", "\0", "x" * 300],
    "--vae": ["INPUTS/file.png", "INPUTS/folder", "x", "", "\0", LONE, "x" * 300],
    "--tokenizer": ["INPUTS/file.png", "INPUTS/folder", "INPUTS/words.txt.gz", "", "\0"],
    "--shift": _FLOATS,
    "--prompt-syntax": ["a1111", "plain", "x", ""],
    "--model": ["INPUTS/file.png", "INPUTS/folder", "owner/name", "", "\0", LONE, "x" * 300, "/dev/zero", "emoji/.."],
}
_CONTROLS = ("canny", "", "x", "\0", "INPUTS/file.png", "INPUTS/folder")
_CONTROL_PICTURES = ("INPUTS/small.png", "INPUTS/small.png:nan", "INPUTS/small.png:1e308", "INPUTS/file.png", "x:1", "")
_MORE = {
    "generate": {
        "--negative": TEXTS,
        "--count": _INTEGERS[:3],
        "--batch": ["0", "2", "-1"],
        "--image": ["INPUTS/file.png", "INPUTS/small.png"],
        "--mask": ["INPUTS/file.png", "INPUTS/small.png", "x"],
        "--second-prompt": [*TEXTS, *_SYNTAX],
        "--blend": _FLOATS,
        "--class": TEXTS,
        "--prompts": ["INPUTS/prompts.txt", "INPUTS/odd.txt", "INPUTS/folder", "INPUTS/words.txt.gz", "x", "", "\0"],
        "--wildcards": ["INPUTS/folder", "INPUTS/file.png", "INPUTS", "x", "", "\0"],
        "--sheet": ["sheet.png", "a.png", "a.gif", "", "taken", "taken/a.png", "\0", ".png", "x" * 300 + ".png"],
        "--control": [f"{network}={image}" for network in _CONTROLS for image in _CONTROL_PICTURES] + ["x", "", LONE],
        "--embedding": ["INPUTS/file.png", "INPUTS/folder", "x", "", "\0", LONE, "x" * 300, "/dev/zero"],
    },
    "interpolate": {"--fps": _FLOATS, "--ease": ["smooth", "x", ""], "--mode": ["lerp", "x"], "--to-seed": _INTEGERS},
    "compare": {"--teacher": ["INPUTS/folder", "x"], "--teacher-guidance": _FLOATS},
}
_FILES = {
    "../output/taken/a.txt": b"",
    "../output/taken.png": b"mine",
    "file.png": b"no picture",
    "small.png": picture(),
    "prompts.txt": "a cat\n\n漢字 __words__\n".encode(),
    "odd.txt": b"a cat\n\xff\xfe\0\n",
    "words.txt": b"red\nblue\n",
    "folder/a.txt": b"",
    "words.txt.gz": b"\x1f\x8b broken",
}


@st.composite
def command_case(draw: st.DrawFn, models: Path) -> Case:
    """One command with an odd prompt, output or option."""
    command = draw(st.sampled_from([*["generate"] * 6, "interpolate", "compare"]))
    prompts = draw(st.lists(_PROMPTS, min_size=1, max_size=2))
    start = {
        "generate": [prompts[0]],
        "compare": [*prompts, "--steps", "1", "--teacher-steps", "1", "--teacher", str(models / "plain")],
        "interpolate": ["--from", prompts[0], "--to", prompts[-1], "--frames", "2"],
    }[command]
    argv = [command, *start, "--model", str(models / draw(st.sampled_from(["plain", "lcm", "emoji"]))), "--size", "64"]
    argv += [] if command == "compare" else ["--steps", "1"]
    options = {**_OPTIONS, **_MORE[command]}
    for name in draw(st.lists(st.sampled_from(sorted(options)), max_size=2, unique=True)):
        argv += [name, draw(st.sampled_from(options[name]))]
    argv += ["--output", draw(_OUTPUTS)] if draw(st.booleans()) else []
    return Case(tuple(argv), _FILES, encoding=draw(st.sampled_from(["utf-8", "cp1252", "ascii"])))
