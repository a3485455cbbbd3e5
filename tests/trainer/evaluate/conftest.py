"""A benchmark with an untrained network, and an untrained CLIP."""

import json

import pytest
import torch

from trainer.recipes.emoji.benchmark import Benchmark
from trainer.recipes.emoji.data import Drawing
from trainer.recipes.emoji.features import FeatureNetwork


@pytest.fixture(scope="module")
def benchmark():
    """A small benchmark with an untrained network: the arithmetic is what is tested."""
    labels = ["red apple", "cat face", "pizza", "rocket"]
    entries = [
        Drawing(str(i), label, (), "food", style, held_out=(style == "noto" and i == 0))
        for style in ("noto", "fluent", "twemoji")
        for i, label in enumerate(labels)
    ]
    torch.manual_seed(0)
    network = FeatureNetwork().eval().requires_grad_(False)
    real = network(torch.rand(len(entries), 3, 64, 64) * 2 - 1)
    return Benchmark(entries, real, network, samples=12)


@pytest.fixture
def clip_folder(tmp_path):
    """A tiny CLIP with random weights, as transformers writes it."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")).save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(tokens), "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**shape, "image_size": 16, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path)
    return tmp_path
