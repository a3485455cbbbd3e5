"""Prompts to conditioning, against transformers; CLIP's tokenizer without a network."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lcm_core.errors import InputError
from lcm_core.files import ldm_convert
from lcm_core.files.checkpoint import Component, ModelInfo, read_component, save_single_file
from lcm_core.networks.text_encoder import load_text
from lcm_core.networks.tokenizer import CLIP_WORDS, Tokenizer, _byte_letters, find_tokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = ["c a", "ca t</w>", "d o", "do g</w>"]


def save_tokenizer(folder: Path, pad: str = EOS) -> int:
    """CLIP's tokenizer with four merges; returns the size of its vocabulary."""
    letters = _byte_letters()
    tokens = [*letters, *(f"{x}</w>" for x in letters), *(m.replace(" ", "") for m in MERGES), BOS, EOS]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **special}))
    return len(tokens)


def save_encoder(folder: Path, vocabulary: int, width: int = 32, projected: bool = False, seed: int = 0) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=20,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    model.save_pretrained(folder)
    return model


def sd1(folder: Path) -> Any:
    return save_encoder(folder / "text_encoder", save_tokenizer(folder / "tokenizer"))


def sdxl(folder: Path) -> tuple[Any, Any]:
    first = sd1(folder)
    return first, save_encoder(folder / "text_encoder_2", save_tokenizer(folder / "tokenizer_2", "!"), 48, True, 1)


def rows(folder: Path, prompts: list[str], pad: str = EOS) -> torch.Tensor:
    """Token rows by transformers itself."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, pad_token=pad)
    return tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def test_sd1_prompts_equal_transformers(tmp_path: Path) -> None:
    """Another padding, layer or order of prompts would paint another picture than diffusers does."""
    model, prompts = sd1(tmp_path), ["a cat", "", "dog, café 2!"]
    cond = load_text(tmp_path, "cpu").encode(prompts)
    expected = model(rows(tmp_path / "tokenizer", prompts)).last_hidden_state
    assert cond.keys() == {"encoder_hidden_states"}
    torch.testing.assert_close(cond["encoder_hidden_states"], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_clip_skip_takes_an_earlier_layer_with_the_final_norm(tmp_path: Path) -> None:
    """Anime checkpoints were trained on the last layer but one, normed."""
    model = sd1(tmp_path)
    hidden = model(rows(tmp_path / "tokenizer", ["cat"]), output_hidden_states=True).hidden_states
    expected = getattr(model, "text_model", model).final_layer_norm(hidden[-2])
    given = load_text(tmp_path, "cpu", clip_skip=1).encode(["cat"])["encoder_hidden_states"]
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="clip_skip 3 is out of range"):
        load_text(tmp_path, "cpu", clip_skip=3)


@torch.no_grad()
def test_sdxl_conditioning_equals_diffusers(tmp_path: Path) -> None:
    """Layer, order of the two encoders, pooled text and the six sizes, by diffusers' own pipeline."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    first, second = sdxl(tmp_path)
    tokenizers = [CLIPTokenizer.from_pretrained(tmp_path / name) for name in ("tokenizer", "tokenizer_2")]
    for tokenizer in tokenizers:
        tokenizer.model_max_length = 77
    pipe = StableDiffusionXLPipeline(None, first, second, *tokenizers, None, None)  # type: ignore[arg-type]
    expected, _, pooled, _ = pipe.encode_prompt(["a cat", "dog"], device="cpu", do_classifier_free_guidance=False)
    text = load_text(tmp_path, "cpu")
    cond = text.encode(["a cat", "dog"], size=(768, 1024), original_size=(512, 640), crop=(3, 5))
    torch.testing.assert_close(cond["encoder_hidden_states"], expected, rtol=1e-4, atol=1e-5)
    added = cond["added_cond_kwargs"]
    torch.testing.assert_close(added["text_embeds"], pooled, rtol=1e-4, atol=1e-5)
    assert added["time_ids"].tolist() == [[512, 640, 3, 5, 768, 1024]] * 2  # original + crop + target
    assert text.encode(["dog"], size=(64, 96))["added_cond_kwargs"]["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]]


def test_prompts_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    """A picture must be the same, bit for bit, whatever is painted beside it."""
    sd1(tmp_path)
    alone = load_text(tmp_path, "cpu").encode(["cat"])["encoder_hidden_states"]
    together = load_text(tmp_path, "cpu").encode(["a dog", "cat", "x"])["encoder_hidden_states"]
    assert torch.equal(together[1:2], alone)


def test_prompts_are_encoded_once(tmp_path: Path) -> None:
    """The cache must answer without the network, forget on request, and stay small."""
    sd1(tmp_path)
    text = load_text(tmp_path, "cpu")
    first = text.encode(["cat", "dog", "cat"])["encoder_hidden_states"]
    assert torch.equal(first[0], first[2])
    with torch.no_grad():
        for parameter in text.encoders[0].model.parameters():
            parameter.zero_()
    assert torch.equal(text.encode(["dog"])["encoder_hidden_states"], first[1:2])
    text.clear_cache()
    assert not torch.equal(text.encode(["dog"])["encoder_hidden_states"], first[1:2])
    for number in range(200):
        text.encode([str(number)])
    assert text._encode.cache_info().currsize <= 64


def test_long_prompts_name_the_lost_words(tmp_path: Path) -> None:
    """Words that are dropped in silence leave the artist wondering."""
    sd1(tmp_path)
    text = load_text(tmp_path, "cpu")
    with pytest.warns(UserWarning, match="left out: 'dog dog cat'"):
        cond = text.encode(["cat " * 75 + "dog dog cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(text.encode(["cat " * 75])["encoder_hidden_states"], cond["encoder_hidden_states"])


def single_file(folder: Path, file: Path, family: str, files: dict[str, str] | None = None) -> None:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {"block_out_channels": (32,), "layers_per_block": 1, "cross_attention_dim": 32}
    settings |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet: nn.Module = UNet2DConditionModel(**settings)
    parts = {"unet": Component(dict(unet.state_dict()), dict(unet.config))}
    for name in ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",):
        parts[name] = read_component(folder, name)
    save_single_file(file, parts, ModelInfo(family), files)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_single_files_encode_like_their_folders(family: str, tmp_path: Path) -> None:
    """Renaming, splitting and transposing the text encoders' weights must not change one prompt."""
    (sdxl if family == "sdxl" else sd1)(tmp_path / "model")
    single_file(tmp_path / "model", tmp_path / "other" / "one.safetensors", family)
    expected = load_text(tmp_path / "model", "cpu").encode(["a cat"])
    given = load_text(tmp_path / "other" / "one.safetensors", "cpu", tokenizer=tmp_path / "model").encode(["a cat"])
    torch.testing.assert_close(given, expected, rtol=0, atol=2e-6)


def test_tokenizer_is_found_beside_inside_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single files have no vocabulary: each of the places where one may be must be tried, the given one first."""
    sd1(tmp_path / "model")
    names = ("vocab.json", "merges.txt", "tokenizer_config.json")
    files = {name: (tmp_path / "model" / "tokenizer" / name).read_text() for name in names}
    inside, bare = tmp_path / "inside.safetensors", tmp_path / "bare" / "bare.safetensors"
    single_file(tmp_path / "model", inside, "sd1", files)
    single_file(tmp_path / "model", bare, "sd1")
    expected = rows(tmp_path / "model" / "tokenizer", ["a cat"])[0].tolist()
    save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")  # another model's: must not win over its own
    assert Tokenizer(find_tokenizer(inside))("a cat") == expected
    assert Tokenizer(find_tokenizer(bare, tmp_path / "model" / "tokenizer"))("a cat") == expected
    with pytest.raises(InputError, match=r"bare.safetensors has no tokenizer; put its tokenizer folder"):
        find_tokenizer(bare)  # its text encoder has words of its own, for which CLIP's numbers would be others
    (bare.parent / "tokenizer").symlink_to(tmp_path / "model" / "tokenizer")
    assert Tokenizer(find_tokenizer(bare))("a cat") == expected
    with pytest.raises(InputError, match=r"nowhere has no vocab.json"):
        find_tokenizer(bare, tmp_path / "nowhere")
    (tmp_path / "model" / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(InputError, match=r"vocab\.json of .*model/tokenizer is not readable JSON .*; get it again"):
        find_tokenizer(tmp_path / "model")


PUBLISHED = [  # with CLIP
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("a diagram", [320, 22697]),
    ("a dog", [320, 1929]),
    ("hello world!", [3306, 1002, 256]),
]


@pytest.mark.parametrize(("words", "numbers"), PUBLISHED)
def test_an_ordinary_single_file_has_clip_s_own_words(tmp_path: Path, words: str, numbers: list[int]) -> None:
    """Checkpoints of one file carry no tokenizer; nothing has to be installed or downloaded for them."""
    file = tmp_path / "model.safetensors"
    save_file(
        {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(49408, 1)}, file
    )
    row = [49406, *numbers, 49407]
    assert Tokenizer(find_tokenizer(file))(words) == row + [49407] * (77 - len(row))
    assert Tokenizer(find_tokenizer(file), pad=0)(words) == row + [0] * (77 - len(row))
    named = find_tokenizer(tmp_path / "none", CLIP_WORDS)  # the list itself can be given too
    assert Tokenizer(named)(words)[: len(row)] == row


def test_clip_s_own_words_are_those_of_open_clip(tmp_path: Path) -> None:
    """Every word and its number; but for the names of start and end."""
    module = pytest.importorskip("open_clip.tokenizer")
    theirs = {word: number for word, number in module.SimpleTokenizer().encoder.items() if number < 49406}
    ours = find_tokenizer(tmp_path / "none", CLIP_WORDS).get_vocab()
    assert {word: number for word, number in ours.items() if number < 49406} == theirs


def test_an_openclip_single_file_pads_with_zero(tmp_path: Path) -> None:
    """SD 2.x and SDXL's second encoder were trained on zero padding, which a single file does not say."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sd1(tmp_path / "model")
    model = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, hidden_act="gelu"
        )
    )
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    component = Component(ldm_convert.clip_to_diffusers(state), model.config.to_dict())
    save_single_file(tmp_path / "one.safetensors", {"text_encoder": component}, ModelInfo("sd2"))
    text = load_text(tmp_path / "one.safetensors", "cpu", tokenizer=tmp_path / "model")
    assert text.encoders[0].tokenizer("cat")[-1] == 0


def test_a_model_without_clip_is_refused(tmp_path: Path) -> None:
    """SD3's or Flux's T5 is not an encoder that this U-Net can be fed from."""
    sd1(tmp_path)
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"CLIPTextModel"', '"T5EncoderModel"'))
    with pytest.raises(InputError, match="holds a T5EncoderModel"):
        load_text(tmp_path, "cpu")
