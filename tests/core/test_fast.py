"""Networks made fast for a CPU against the untouched ones, and the attention inside them against its definition."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lcm_core.errors import InputError
from lcm_core.files.lora import merge, read_lora
from lcm_core.networks.cpu.optimise import Transformer, optimise_unet, optimise_vae
from lcm_core.networks.cpu.packed import FoldedUpsample, PackedConv2d, PackedLinear, attention, can_pack
from lcm_core.networks.lora_layers import add_lora

ROOT = Path(__file__).parents[2]
WIDTH = 48  # of the text embedding

pytestmark = pytest.mark.skipif(not can_pack(torch.float32), reason="needs a processor with AVX2")
needs_bfloat16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="needs a processor with AVX-512")


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def make_unet(**settings: Any) -> Any:
    """Two levels, of which the first has 1024 tokens for 32 x 32 latents: long enough for the two-product attention."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    base: dict[str, Any] = {
        "sample_size": 32,
        "block_out_channels": (40, 80),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,  # diffusers' name for the number of heads here
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(base | settings)).eval().requires_grad_(False)


def make_fast(unet: Any) -> Any:
    return optimise_unet(copy.deepcopy(unet).to(memory_format=torch.channels_last))


def make_inputs(batch: int = 2, height: int = 32, width: int = 32, tokens: int = 77) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.tensor([13.0, 801.5])[:batch],
        "encoder_hidden_states": torch.randn(batch, tokens, WIDTH, generator=generator),
    }


def assert_same(fast: Any, unet: Any, inputs: dict[str, Any]) -> None:
    expected = unet(**inputs).sample
    scale = float(expected.abs().max())
    torch.testing.assert_close(fast(**inputs).sample, expected, rtol=0, atol=1e-5 * scale)


SDXL = {
    "use_linear_projection": True,
    "transformer_layers_per_block": (2, 1),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "sd1": {},
    "sd2": {"use_linear_projection": True, "upcast_attention": True, "attention_head_dim": (2, 4)},
    "sdxl": SDXL,
    "lcm": {"time_cond_proj_dim": 16},
    "unknown blocks": {"resnet_time_scale_shift": "scale_shift", "mid_block_scale_factor": 2.0},
}


@pytest.mark.parametrize("layer", ["conv", "upsample"])
def test_weights_are_packed_anew_in_each_call(layer: str, capfd: pytest.CaptureFixture[str]) -> None:
    """After the first picture of a size, the kernels find the weights in their order, whatever size came before."""
    conv = torch.nn.Conv2d(1280, 1280, 3, padding=1)
    packed = PackedConv2d(conv) if layer == "conv" else FoldedUpsample(conv)
    for side in (8, 32):
        x = torch.randn(1, 1280, side, side).contiguous(memory_format=torch.channels_last)
        big = functional.interpolate(x, scale_factor=2.0) if layer == "upsample" else x
        torch.testing.assert_close(packed(x), conv(big), rtol=1e-4, atol=1e-4)
        capfd.readouterr()
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            packed(x)
        lines = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line]
        assert any(",convolution," in line for line in lines)
        assert not [line for line in lines if ",reorder," in line and "1280x1280" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_output_equals_the_untouched_unet(kind: str) -> None:
    """Every rewritten block must compute what diffusers computes; blocks that are not known must still work."""
    unet, inputs = make_unet(**KINDS[kind]), make_inputs()
    extra: dict[str, Any] = {}
    if kind == "sdxl":
        extra["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 16), "time_ids": torch.rand(2, 6)}
    if kind == "lcm":
        extra["timestep_cond"] = torch.randn(2, 16)
    assert_same(make_fast(unet), unet, inputs | extra)


@pytest.mark.parametrize(("height", "width"), [(16, 48), (37, 29)])
def test_other_sizes(height: int, width: int) -> None:
    """Weights are packed for no size in particular; odd sides double to an odd size, which four phases cannot."""
    unet = make_unet()
    assert_same(make_fast(unet), unet, make_inputs(1, height, width))


def test_each_prompt_gets_its_own_text() -> None:
    """Text folded for one prompt must not be used for the next, not even when it was written into the same tensor."""
    unet, inputs = make_unet(), make_inputs(tokens=20)
    fast = make_fast(unet)
    assert_same(fast, unet, inputs)
    inputs["encoder_hidden_states"] += torch.randn_like(inputs["encoder_hidden_states"])
    assert_same(fast, unet, inputs)
    assert_same(fast, unet, make_inputs(1, tokens=20))
    assert_same(fast, unet, make_inputs(1, tokens=9))


def test_text_is_folded_once_per_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps with one prompt must not pay four times for its text, although every step brings a new tensor."""
    from lcm_core.networks.cpu.optimise import CrossAttention

    fast, inputs, folded = make_fast(make_unet()), make_inputs(1), []
    original = CrossAttention._fold
    monkeypatch.setattr(CrossAttention, "_fold", lambda self, text: folded.append(1) or original(self, text))
    for _ in range(4):
        fast(**(inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].clone()}))
    assert len(folded) == sum(isinstance(module, CrossAttention) for module in fast.modules()) == 4


def test_same_bits_after_another_size_and_prompt() -> None:
    """What was painted before must leave no trace in a picture."""
    unet, inputs = make_unet(), make_inputs(1)
    used = make_fast(unet)
    used(**make_inputs(2, 48, 16, tokens=9))
    assert torch.equal(used(**inputs).sample, make_fast(unet)(**inputs).sample)


def test_lora_merged_before_stays() -> None:
    """Fused projections must be made from the merged weights."""
    unet, inputs = make_unet(), make_inputs(1)
    plain, generator, tensors = make_fast(unet), torch.Generator().manual_seed(2), {}
    for attn in ("attn1", "attn2"):
        for name in ("to_q", "to_k", "to_v", "to_out_0"):
            into = WIDTH if attn == "attn2" and name in ("to_k", "to_v") else 80
            key = f"lora_unet_mid_block_attentions_0_transformer_blocks_0_{attn}_{name}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, into, generator=generator) * 0.1
            tensors[f"{key}.lora_up.weight"] = torch.randn(80, 4, generator=generator)
    merge(unet, [(read_lora(tensors), 0.5)])
    merged = make_fast(unet)
    assert_same(merged, unet, inputs)
    assert (merged(**inputs).sample - plain(**inputs).sample).abs().max() > 1e-3


def test_adapters_are_left_alone() -> None:
    """A block with adapters must keep them, and the layer below with a weight that they can be merged into."""
    unet, inputs = make_unet(), make_inputs(1)
    adapters = add_lora(unet, rank=2)
    for layer in adapters.layers.values():
        layer.up.weight.normal_()
    with pytest.raises(InputError, match="under training"):
        optimise_unet(unet)
    unet.requires_grad_(False)
    expected = unet(**inputs).sample
    fast = optimise_unet(unet)
    assert isinstance(fast.conv_in, PackedConv2d)
    assert all(type(layer.base) in (torch.nn.Linear, torch.nn.Conv2d) for layer in adapters.layers.values())
    torch.testing.assert_close(fast(**inputs).sample, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_no_weight_is_held_twice() -> None:
    """Packed layers take the place of the weights; only norms, and what odd sizes need, remain as they were."""
    unet = make_unet()
    fast = make_fast(unet)
    assert sum(p.numel() for p in fast.parameters()) < 0.01 * sum(p.numel() for p in unet.parameters())
    kinds = {type(module) for module in fast.modules()}
    assert {Transformer, PackedLinear, PackedConv2d} <= kinds
    assert not kinds & {torch.nn.Linear, torch.nn.Conv2d}


def test_float16_stays_as_it_is() -> None:
    """There are no packed kernels for float16 on most processors."""
    unet = optimise_unet(make_unet().half())
    assert type(unet.conv_in) is torch.nn.Conv2d


def test_masks_are_refused() -> None:
    """A mask that is silently ignored would change the picture."""
    fast, inputs = make_fast(make_unet()), make_inputs(1)
    with pytest.raises(ValueError, match="attention mask"):
        fast(**inputs, encoder_attention_mask=torch.ones(1, 77))


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_vae(kind: str) -> None:
    """The VAEs share blocks with the U-Net, without a time embedding."""
    import diffusers

    torch.manual_seed(0)
    full = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 8,
    }
    tiny = {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16)}
    tiny |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}  # type: ignore[dict-item]
    vae = getattr(diffusers, kind)(**(full if kind == "AutoencoderKL" else tiny)).eval().requires_grad_(False)
    fast = optimise_vae(copy.deepcopy(vae).to(memory_format=torch.channels_last))
    latents, image = torch.randn(1, 4, 12, 8), torch.randn(1, 3, 24, 16)
    torch.testing.assert_close(fast.decode(latents).sample, vae.decode(latents).sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast(image).sample, vae(image).sample, rtol=1e-5, atol=1e-5)


def random_heads(tokens: int, dim: int, sharpness: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, tokens, 3, dim, generator=generator).transpose(1, 2).to(dtype) for _ in range(3))
    return [q * sharpness, k + 3, v]  # keys share a mean, as trained ones do


def error(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.parametrize("sharpness", [0.1, 1, 3, 50])
@pytest.mark.parametrize("dim", [16, 40, 47, 64])
def test_attention_equals_its_definition(dim: int, sharpness: float) -> None:
    """At sharpness 50 the bound on the scores is so wide that sigmoids underflow, which must be noticed."""
    q, k, v = random_heads(700, dim, sharpness)
    expected = functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(attention(q, k, v), expected) < 5e-6


def test_attention_repairs_only_the_heads_that_need_it() -> None:
    """Sharp heads go to torch's kernel; the others must not be touched by that."""
    q, k, v = random_heads(300, 40, 1)
    q[0, 1] *= 1000
    expected = functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(attention(q, k, v), expected) < 2e-5  # scores in the thousands have few digits left
    q[0, 1] = torch.nan
    assert attention(q, k, v).isnan().flatten(2).all(-1).nonzero().tolist() == [[0, 1]]


@needs_bfloat16
@pytest.mark.parametrize("sharpness", [0.1, 1, 3])
def test_attention_in_bfloat16(sharpness: float) -> None:
    """It rounds more than torch's kernel, but must stay of the size of bfloat16's own steps of 2^-8."""
    q, k, v = random_heads(1500, 40, sharpness, torch.bfloat16)
    expected = functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(attention(q, k, v), expected) < 2 * 2**-8


@needs_bfloat16
def test_unet_in_bfloat16_is_as_exact_as_before() -> None:
    """Folding and packing must not cost precision: both are compared with float32."""
    unet, inputs = make_unet(), make_inputs()
    expected = unet(**inputs).sample.double()
    low = {name: tensor.bfloat16() for name, tensor in inputs.items()} | {"timestep": inputs["timestep"]}
    before = copy.deepcopy(unet).to(torch.bfloat16)
    assert error(make_fast(before)(**low).sample, expected) < 1.2 * error(before(**low).sample, expected)


def test_benchmark_runs() -> None:
    """`benchmarks/cpu_sd15.py` must not rot: its smallest size prints all comparisons with their ratios."""
    command = [sys.executable, "benchmarks/cpu_sd15.py", "--size", "tiny", "--rounds", "1", "--no-openvino"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # in case the package is not installed
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("lcm_core")]
    assert len(rows) == 3
    assert all(" x " in row for row in rows)
