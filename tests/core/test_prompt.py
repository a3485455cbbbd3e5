"""Prompts as people write them: A1111's and ComfyUI's own parsers say what the weights are.

`-m host` asks their checkouts, named by A1111_PATH and COMFYUI_PATH with A1111_PYTHON and COMFYUI_PYTHON; without it,
their answers in data/prompts.json are compared with, which `LCM_SUITE_RECORD=1` writes again.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from lcm_core.errors import InputError
from lcm_core.networks.chunks import split_chunks
from lcm_core.networks.prompt import BREAK, parse_weights, split_parts, texts_at_steps
from lcm_core.networks.text_encoder import TextEncoder, keep_mean, load_text
from lcm_core.networks.tokenizer import CLIP_WORDS, Tokenizer, _clip_files, build_tokenizer
from lcm_core.pipeline.sources import MODELS

RECORDED = Path(__file__).parent / "data" / "prompts.json"
SCRIPT = Path(__file__).parent / "prompt_hosts.py"
END = 49407


@cache
def recorded() -> list[dict[str, Any]]:
    return json.loads(RECORDED.read_text())


@cache
def clip() -> Tokenizer:
    return Tokenizer(build_tokenizer(_clip_files(CLIP_WORDS), CLIP_WORDS))


@cache
def emoji() -> TextEncoder:
    return load_text(MODELS / "emoji", "cpu")


def filled(chunk: list[list[float]]) -> list[list[float]]:
    """A recorded chunk with the padding that was left out."""
    return chunk + [[END, 1.0]] * (77 - len(chunk))


def chunks(prompt: str) -> list[list[list[float]]]:
    rows = []
    for chunk in split_chunks(clip(), parse_weights(prompt), {}):
        ids = clip().row(chunk.ids)
        rows.append([[number, 1.0] for number in ids])
        for place, weight in enumerate(chunk.weights, 1):
            rows[-1][place][1] = weight
    return rows


def check_a1111(prompt: str, said: dict[str, Any]) -> None:
    assert chunks(prompt) == [filled(chunk) for chunk in said["chunks"]], prompt
    segments = [[text, -1.0] if (text, weight) == BREAK else [text, weight] for text, weight in parse_weights(prompt)]
    assert segments == said["segments"], prompt
    assert texts_at_steps(prompt, 10) == said["steps"], prompt
    if len(said["parts"]) > 1:  # A1111 takes the end of "ratio 16:9" for a weight, here that needs an AND
        assert [[text.strip(), weight] for text, weight in split_parts(prompt)] == [
            [text.strip(), weight] for text, weight in said["parts"]
        ], prompt


def test_weights_differ_from_the_hosts() -> None:
    assert len(recorded()) >= 30
    for said in recorded():
        check_a1111(said["prompt"], said["a1111"])
    same = [said for said in recorded() if said["a1111"]["chunks"] == said["comfyui"]["chunks"]]
    assert len(same) >= 12
    for said in same:
        assert chunks(said["prompt"]) == [filled(chunk) for chunk in said["comfyui"]["chunks"]]


def ask(kind: str, prompts: list[str], *arguments: str) -> list[dict[str, Any]]:
    name = "A1111" if kind == "a1111" else "COMFYUI"
    if not (checkout := os.environ.get(f"{name}_PATH")):
        pytest.skip(f"needs {name}_PATH and {name}_PYTHON")
    command = [os.environ.get(f"{name}_PYTHON", sys.executable), str(SCRIPT), kind, checkout, *arguments]
    done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["prompts"]


def stripped(said: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for chunk in said["chunks"]:
        end = len(chunk)
        while end > 1 and chunk[end - 1] == [END, 1.0]:
            end -= 1
        rows.append(chunk[:end])
    return {**said, "chunks": rows}


@pytest.mark.host
@torch.no_grad()
def test_a_host_of_today_says_something_else(tmp_path: Path) -> None:
    """The same prompts through the checkouts, and A1111's encodings with a random text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPTextModel(config)
    for name, parameter in model.named_parameters():
        if "final_layer_norm" in name:  # else the mean, which A1111 divides by, is 0
            parameter.normal_(mean=0.5)
    model.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    for name, content in _clip_files(CLIP_WORDS).items():
        (tmp_path / "tokenizer" / name).write_text(content)
    prompts = [said["prompt"] for said in recorded()]
    result = tmp_path / "result.safetensors"
    a1111 = ask("a1111", prompts, str(tmp_path / "text_encoder"), str(tmp_path / "tokenizer"), str(result))
    comfyui = ask("comfyui", prompts)
    said = [
        {"prompt": prompt, "a1111": stripped(first), "comfyui": stripped(second)}
        for prompt, first, second in zip(prompts, a1111, comfyui, strict=True)
    ]
    if os.environ.get("LCM_SUITE_RECORD"):
        RECORDED.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in said) + "\n]\n")
        recorded.cache_clear()
    assert said == recorded()
    text, states = load_text(tmp_path, "cpu"), load_file(result)
    for number, prompt in enumerate(prompts):
        given = text.encode([prompt], weighted=True)["encoder_hidden_states"]
        assert_close(given, states[str(number)], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_weighted_words_lose_the_mean() -> None:
    """A1111: each state times its weight, then all of them scaled to the mean that they had; here in float64."""
    text = emoji()
    plain = text.encode(["a red apple, noto style"])["encoder_hidden_states"]
    given = text.encode(["a (red:1.3) [apple], noto style"], weighted=True)["encoder_hidden_states"]
    ids = text.encoders[0].tokenizer
    places = {word: 1 + len(ids.words(before)) for word, before in (("red", "a"), ("apple", "a red"))}
    weights = torch.ones(77, dtype=torch.float64)
    for word, weight in (("red", 1.3), ("apple", 1 / 1.1)):
        weights[places[word] : places[word] + len(ids.words(word))] = weight
    expected = plain.double() * weights[:, None]
    expected *= plain.double().mean() / expected.mean()
    assert_close(given.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_without_syntax_changes() -> None:
    text = emoji()
    for prompt in ("a slice of pizza, noto style", "time: 12:30, a cat", "", "x" * 30):
        plain, weighted = (text.encode([prompt], weighted=flag) for flag in (False, True))
        assert torch.equal(plain["encoder_hidden_states"], weighted["encoder_hidden_states"])


def test_literal_brackets_are_lost() -> None:
    text = emoji()
    plain = text.encode(["a (red) [apple]"])["encoder_hidden_states"]
    escaped = text.encode([r"a \(red\) \[apple\]"], weighted=True)["encoder_hidden_states"]
    assert torch.equal(plain, escaped)


def test_words_beyond_75_are_left_out() -> None:
    text = emoji()
    both = text.encode(["a cat BREAK a dog"], weighted=True)["encoder_hidden_states"]
    alone = [text.encode([words])["encoder_hidden_states"] for words in ("a cat", "a dog")]
    assert torch.equal(both, torch.cat(alone, dim=1))
    long = text.encode(["apple " * 200, "a cat"], weighted=True)["encoder_hidden_states"]
    assert long.shape[1] % 77 == 0
    assert long.shape[1] >= 3 * 77
    assert torch.equal(long[1, :77], alone[0][0])
    for prompt in ("apple " * 100_000, "BREAK " * 100):
        with pytest.raises(InputError, match="more than 2400 tokens"):
            text.encode([prompt], weighted=True)


def test_a_prompt_takes_long_to_read() -> None:
    """Thousands of brackets must not take minutes, nor end in a RecursionError."""
    start = time.process_time()
    for prompt in ("[" * 30_000 + "]" * 30_000, "[a:" * 30_000, "(a" * 30_000, "a" + " " * 50_000 + "b BREAK AND"):
        for read in (parse_weights, split_parts, lambda text: texts_at_steps(text, 2)):
            with contextlib.suppress(InputError):
                read(prompt)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("(a:1e3)", None), ("(a:99999)", "weight 99999 of 'a' is out of range"), ("a AND " * 40, "AND joins 41 prompts")],
)
def test_an_impossible_weight_paints_noise(prompt: str, words: str | None) -> None:
    def read() -> None:
        for text, _ in split_parts(prompt):
            parse_weights(text)

    if words is None:
        read()
    else:
        with pytest.raises(InputError, match=words):
            read()


def test_the_second_pass_begins_with_the_first_prompt_again() -> None:
    assert texts_at_steps("[a:b:0.5]", 4) == ["a", "a", "b", "b"]
    assert texts_at_steps("[a:b:0.5]", 4, earlier=4) == ["b"] * 4
    assert texts_at_steps("[a:b:1.5] [c::5]", 4, earlier=4) == ["a c", "a ", "b ", "b "]


def test_weights_on_states_of_mean_0_make_nan() -> None:
    """Layer norms of plain weights give such states, whose mean is rounding alone, and 0 on some processors."""
    states = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    assert_close(keep_mean(2 * states, states), 2 * states, rtol=0, atol=0)
    moved = states + 1
    assert_close(keep_mean(moved * 3, moved), moved)
