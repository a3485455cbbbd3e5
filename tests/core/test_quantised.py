"""Weights stored in 8 bits are read as the numbers that torch's own quantisation gives, and broken ones refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import read_component
from lcm_core.files.quantised import dequantise, quantise
from lcm_core.files.safetensors import DIFFUSERS_WEIGHTS, int8_variant, read_safetensors, write_safetensors


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-7, 1, 128)  # channels of very different size, down to what float16 rounds away
    return {
        "big.weight": torch.randn(128, 64, 3, 3, generator=generator) * spread.view(-1, 1, 1, 1),
        "big.bias": torch.randn(128, generator=generator),
        "small.weight": torch.randn(4, 4, generator=generator),
        "zeros.weight": torch.zeros(128, 128),
    }


def test_equal_to_torchs_quantisation_by_channel() -> None:
    given = weights()
    stored = quantise(given)
    scale = stored["big.weight_scale"].float()
    zero = torch.zeros(len(scale), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(given["big.weight"], scale, zero, 0, -127, 127)
    column = scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(stored["big.weight"] * column, expected)
    read = dequantise(stored, "here")
    assert read.keys() == given.keys()
    torch.testing.assert_close(read["big.weight"].float(), expected, rtol=1e-3, atol=6e-8)
    error = (expected - given["big.weight"]).abs()
    assert bool((error <= 0.501 * column).all()), "a weight lies outside of its channel's range"


def test_small_weights_biases_and_zeros_are_kept() -> None:
    read = dequantise(quantise(weights()), "here")
    for name in ("big.bias", "small.weight"):
        torch.testing.assert_close(read[name], weights()[name], rtol=0, atol=0)
    assert not read["zeros.weight"].any()


def test_a_folder_with_8_bit_weights_is_a_model_like_any_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(64,), down_block_types=("DownEncoderBlock2D",), norm_num_groups=32)
    vae.half().save_pretrained(tmp_path / "vae")
    plain = tmp_path / "vae" / DIFFUSERS_WEIGHTS
    file = plain.with_name(int8_variant(plain.name))
    write_safetensors(file, quantise(read_safetensors(plain)[0]))
    assert file.stat().st_size < 0.55 * plain.stat().st_size
    plain.unlink()
    with pytest.raises(OSError, match="no file named"):  # diffusers would take whole numbers for weights
        AutoencoderKL.from_pretrained(tmp_path / "vae")
    read = read_component(tmp_path, "vae").tensors
    assert read.keys() == vae.state_dict().keys()
    for name, tensor in vae.state_dict().items():
        assert read[name].dtype == torch.float16
        limit = tensor.abs().amax().item() / 245 if tensor.ndim > 1 else 0
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=limit)


@pytest.mark.parametrize(
    "change",
    [
        {"big.weight": None},
        {"big.weight": torch.zeros(128, 64, 3, 3)},
        {"big.weight_scale": torch.ones(127)},
        {"big.weight_scale": torch.ones(())},
        {"big.weight_scale": torch.ones(128).to(torch.float8_e4m3fn)},
        {"big.weight_scale": torch.ones(128, dtype=torch.int64)},
    ],
    ids=["no weight", "no whole numbers", "too few scales", "one scale", "scales in 8 bits", "whole scales"],
)
def test_scales_that_fit_no_weight_are_refused(change: dict[str, Tensor | None]) -> None:
    broken = {name: tensor for name, tensor in (quantise(weights()) | change).items() if tensor is not None}
    with pytest.raises(InputError, match=r"a/file has 'big.weight_scale', which fits no 8-bit weight"):
        dequantise(broken, "a/file")
