"""SDXL's own needs: two text encoders, pooled text, and the sizes of every single picture."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from lcm_core.networks.text_encoder import load_text
from lcm_core.pipeline.sources import MODELS
from trainer.data.cache import Pick, prepare
from trainer.data.settings import DataConfig

PROJECTED = 16


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The embedded model's VAE and text encoder with a second one and an SDXL U-Net, both tiny and random."""
    root, emoji = tmp_path_factory.mktemp("models") / "sdxl", MODELS / "emoji"
    for part, name in (("vae",) * 2, ("text_encoder",) * 2, ("tokenizer",) * 2, ("tokenizer", "tokenizer_2")):
        shutil.copytree(emoji / part, root / name)
    torch.manual_seed(0)
    first = CLIPTextConfig.from_pretrained(emoji / "text_encoder")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {name: getattr(first, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(**sizes, **words, projection_dim=PROJECTED)
    CLIPTextModelWithProjection(config).save_pretrained(root / "text_encoder_2")
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=first.hidden_size + 32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + PROJECTED,
    ).save_pretrained(root / "unet")
    return root


def read_all(cache, bucket):
    return cache.read([Pick(bucket, row, row == 1) for row in range(cache.buckets[bucket])])


def test_each_picture_has_its_own_sizes_and_a_dropped_caption_loses_its_pooled_text_too(teacher, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, size in (("a", (128, 96)), ("b", (90, 60)), ("c", (64, 64))):
        Image.new("RGB", size, "red").save(data / f"{name}.png")
        (data / f"{name}.txt").write_text(f"a red {name}")
    cache = prepare(DataConfig(path=str(data), resolution=64, buckets=False), teacher, tmp_path / "cache", "cpu")
    batch = read_all(cache, "8x8")
    given, null = (cond["added_cond_kwargs"] for cond in (batch.conditioning, batch.null_conditioning))
    # original height and width, top and left of the crop after scaling, target height and width
    expected = torch.tensor([[96, 128, 0, 11, 64, 64], [60, 90, 0, 16, 64, 64], [64, 64, 0, 0, 64, 64]]).float()
    torch.testing.assert_close(given["time_ids"], expected, rtol=0, atol=0)
    torch.testing.assert_close(null["time_ids"], expected, rtol=0, atol=0)
    text = load_text(teacher, "cpu").encode(["a red a", "", "a red c"])
    for ours, theirs in (
        (batch.conditioning["encoder_hidden_states"], text["encoder_hidden_states"]),
        (given["text_embeds"], text["added_cond_kwargs"]["text_embeds"]),
    ):
        torch.testing.assert_close(ours, theirs.half().float(), rtol=0, atol=0)
    assert given["text_embeds"].shape == (3, PROJECTED)
    torch.testing.assert_close(null["text_embeds"], given["text_embeds"][1:2].expand(3, -1), rtol=0, atol=0)


def test_the_teacher_paints_prompts_with_its_sizes(teacher, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a red apple\na cat\n")
    config = DataConfig(prompts=str(tmp_path / "prompts.txt"), teacher_steps=2)
    cache = prepare(config, teacher, tmp_path / "cache", "cpu")
    batch = read_all(cache, "8x8")
    assert bool(torch.isfinite(batch.latents).all())
    assert batch.conditioning["added_cond_kwargs"]["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
