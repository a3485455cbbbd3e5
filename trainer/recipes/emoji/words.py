"""The recipe's tokenizer and text encoder, in the shapes of CLIP's, with a vocabulary of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcm_core.files.atomic import atomic_write
from trainer.recipes.emoji import AnyModule
from trainer.recipes.emoji.colours import HUES
from trainer.recipes.emoji.data import STYLE_TEMPLATES, TEMPLATES, Drawings
from trainer.recipes.emoji.icons import SETS
from trainer.recipes.emoji.scenes import COUNTED, GROUND_PHRASES, GROUNDS, NUMBERS, plural

MERGES = 4800
"""Byte pairs that are joined: about every word of the captions becomes one token."""
CONTEXT_WIDTH = 128
CONTEXT_LENGTH = 77
"""Stable Diffusion's. Hosts pad every prompt to it and the U-Net sees the padding, so training must too."""
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(drawings: Drawings, folder: Path) -> Any:
    """Learn byte pairs from the captions and write CLIP's `vocab.json` and `merges.txt`. Returns the tokenizer.

    All 256 bytes are tokens by themselves, so that any prompt in any script can be given.
    """
    from transformers import CLIPTokenizer

    if not (folder / "merges.txt").exists():
        vocabulary, merges = _learn_byte_pairs(_all_words(drawings))
        with atomic_write(folder / "vocab.json") as temporary:
            temporary.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        with atomic_write(folder / "merges.txt") as temporary:
            temporary.write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        tokenizer = CLIPTokenizer(
            vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=CONTEXT_LENGTH
        )
        tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(vocabulary_size: int) -> AnyModule:
    """An untrained CLIPTextModel, two layers of width 128."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=CONTEXT_WIDTH,
            intermediate_size=4 * CONTEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            projection_dim=CONTEXT_WIDTH,
            bos_token_id=vocabulary_size - 2,
            eos_token_id=vocabulary_size - 1,
            pad_token_id=vocabulary_size - 1,
        )
    )
    # AUTOMATIC1111's emphasis divides by the mean of the output, which a layer norm without bias makes zero.
    norm = next(m for name, m in model.named_modules() if name.endswith("final_layer_norm"))
    nn.init.constant_(norm.bias, 0.5)
    model.set_attn_implementation("eager")  # on a CPU the fused kernel's backward pass is slower
    return model


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """Captions -> (B, 77) token numbers, padded and cut."""
    encoded = tokenizer(captions, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt")
    return torch.as_tensor(encoded.input_ids)


def _all_words(drawings: Drawings) -> Iterable[str]:
    for entry in drawings.entries:
        yield entry.label
        yield from entry.tags
        if entry.group in COUNTED:
            yield plural(entry.label)
    for _ in range(100):  # often enough to become single tokens
        yield from (template.format("") for template in TEMPLATES)
        yield from (template.format("", style) for template in STYLE_TEMPLATES for style in SETS)
        yield from (*GROUNDS, *HUES, *NUMBERS.values())
        yield from (phrase.format("") for phrase in ("an", "and", *GROUND_PHRASES))


def _learn_byte_pairs(words: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """Byte pairs in the order in which they were joined -> (token -> number, "left right" lines)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pieces = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")  # CLIP's own split
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + MERGES, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [" ".join(pair) for pair in learnt]
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *(m.replace(" ", "") for m in merges), START, END]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges
