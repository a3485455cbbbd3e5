"""Loading a U-Net for this machine and calling it in one way, against diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import Component, read_component
from lcm_core.files.safetensors import write_safetensors
from lcm_core.networks.device import choose_memory_format
from lcm_core.networks.unet import UNet, choose_device, choose_dtype, exact_output, load_unet, set_attention


def save_unet(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    base: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    }
    unet = UNet2DConditionModel(**(base | settings)).to(dtype)
    unet.save_pretrained(folder)
    return unet.eval()


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    return x.to(dtype), torch.tensor([13.0, 801.5]), text.to(dtype)


@torch.no_grad()
def test_call_equals_diffusers(tmp_path: Path) -> None:
    """The guidance embedding of a full LCM, text and timesteps must arrive where diffusers puts them."""
    reference = save_unet(tmp_path, time_cond_proj_dim=16)
    unet = UNet(load_unet(tmp_path, "cpu", "float32"))
    x, t, text = inputs()
    w = torch.randn(2, 16)
    expected = reference(x, t, text, timestep_cond=w).sample
    torch.testing.assert_close(unet(x, t, encoder_hidden_states=text, timestep_cond=w), expected, rtol=1e-5, atol=1e-5)
    assert (unet(x, t, encoder_hidden_states=text) - expected).abs().max() > 1e-3
    assert unet.guidance_embedding_dim == 16
    assert not any(p.requires_grad for p in unet.model.parameters())


@torch.no_grad()
def test_sdxl_sizes_keep_their_precision_in_bfloat16(tmp_path: Path) -> None:
    """1023 pixels round to 1024 in bfloat16, so sizes must not be cast with the rest."""
    settings = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 48,
    }
    save_unet(tmp_path, **settings)
    unet = UNet(load_unet(tmp_path, "cpu", "bfloat16"))
    x, t, text = inputs()
    sizes = torch.tensor([[1023.0, 1023, 0, 0, 1023, 1023]] * 2)

    def call(time_ids: torch.Tensor) -> torch.Tensor:
        added = {"text_embeds": torch.ones(2, 16), "time_ids": time_ids}
        return unet(x, t, encoder_hidden_states=text, added_cond_kwargs=added)

    assert not torch.equal(call(sizes), call(sizes + 1))
    assert torch.equal(call(sizes), call(sizes))


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision_files_are_cast_both_ways(dtype: str, tmp_path: Path) -> None:
    """float16 files run in the chosen format, and the caller gets the dtype back that it gave."""
    reference = save_unet(tmp_path, torch.float16).float()
    unet = UNet(load_unet(tmp_path, "cpu", dtype))
    inner = {p.dtype for name, p in unet.model.named_parameters() if not name.startswith("conv_out")}
    assert inner == {getattr(torch, dtype)}
    x, t, text = inputs()
    output = unet(x, t, encoder_hidden_states=text)
    assert output.dtype == torch.float32
    expected = reference(x, t, text).sample
    limit = 1e-4 if dtype == "float32" else 0.05
    assert (output - expected).abs().max() <= limit * expected.abs().max()
    assert unet(x.double(), t, encoder_hidden_states=text).dtype == torch.float64


@torch.no_grad()
def test_attention_kernels_agree(tmp_path: Path) -> None:
    """Choosing the kernel is about speed alone."""
    save_unet(tmp_path)
    model = load_unet(tmp_path, "cpu", "float32", attention="bmm")
    kind = "AttnProcessor"
    assert {type(p).__name__ for p in model.attn_processors.values()} == {kind}
    x, t, text = inputs()
    expected = model(x, t, text).sample
    set_attention(model, "sdpa")
    assert {type(p).__name__ for p in model.attn_processors.values()} == {kind + "2_0"}
    torch.testing.assert_close(model(x, t, text).sample, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="unknown attention 'flash'"):
        set_attention(model, "flash")  # type: ignore[arg-type]


def test_memory_format_is_chosen_and_can_be_overridden(tmp_path: Path) -> None:
    """Convolutions in channels-last are what makes the CPU fast; a silent fallback would not be noticed."""
    save_unet(tmp_path)
    weight = load_unet(tmp_path, "cpu").down_blocks[0].resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    plain = load_unet(tmp_path, "cpu", memory_format=torch.contiguous_format).down_blocks[0].resnets[0].conv1.weight
    assert plain.is_contiguous()
    assert choose_memory_format("mps") == torch.contiguous_format


def test_dtype_follows_the_machine_and_the_user() -> None:
    """bfloat16 where the processor has it, else float32; and what the user says wins."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = "avx512_bf16" in flags or "amx_bf16" in flags
    assert choose_dtype("cpu") == (torch.bfloat16 if fast else torch.float32)
    assert choose_dtype("cpu", parameters=9_000_000) == torch.float32  # small ones are faster so
    assert choose_dtype("cpu", "fp16") == choose_dtype("cpu", "float16") == torch.float16
    assert choose_dtype("cpu", torch.float64) == torch.float64
    assert choose_dtype("mps") == torch.float32
    with pytest.raises(InputError, match="unknown dtype 'int3'"):
        choose_dtype("cpu", "int3")


def test_device_must_be_here() -> None:
    """A device that does not exist, or is not in this machine, gets a line with the remedy, not a trace of torch's."""
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device() == choose_device(choose_device())
    with pytest.raises(InputError, match="device 'abacus' is not available here; use 'cpu'"):
        choose_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device 'cuda' is not available here"):
            choose_device("cuda")


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path: Path) -> None:
    """A network with one weight left at random would paint noise; each misfit is named."""
    save_unet(tmp_path)
    good = read_component(tmp_path, "unet")
    lacking = {k: v for k, v in good.tensors.items() if k != "conv_out.bias"}
    cases = {
        r"lacks 1 weights .*'conv_out.bias'": lacking,
        r"has too many 1 weights .*'odd'": {**good.tensors, "odd": torch.zeros(1)},
        r"'conv_in.weight' has shape \(32, 5, 3, 3\)": {**good.tensors, "conv_in.weight": torch.zeros(32, 5, 3, 3)},
        r"'conv_out.bias' is NaN": {**good.tensors, "conv_out.bias": torch.full((4,), torch.nan)},
    }
    for words, tensors in cases.items():
        with pytest.raises(InputError, match=words):
            load_unet(Component(tensors, good.config, "it"))
    other = Component(good.tensors, {**good.config, "_class_name": "FluxTransformer2DModel"}, "it")
    with pytest.raises(InputError, match="it holds a FluxTransformer2DModel"):
        load_unet(other)


def test_training_on_a_loaded_network_leaves_the_file_alone(tmp_path: Path) -> None:
    """Weights are mapped from the disk; a step of an optimiser must not write to the file."""
    save_unet(tmp_path / "unet")
    before = (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    model = load_unet(tmp_path, "cpu", "float32", torch.contiguous_format)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    expected = model.conv_in.weight.clone()
    write_safetensors(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", model.state_dict())
    assert torch.equal(model.conv_in.weight, expected)


@torch.no_grad()
def test_half_precision_does_not_round_the_output(tmp_path: Path) -> None:
    """bfloat16's rounding of eps would be 6 % of x0 at the last timestep; the last layer must compute in float32."""
    save_unet(tmp_path)
    model = load_unet(tmp_path, "cpu", "bfloat16")
    features = []
    model.conv_out.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    x, t, text = inputs(torch.bfloat16)
    output = model(x, t, text).sample
    weight, bias = read_component(tmp_path, "unet").tensors["conv_out.weight"], model.conv_out.bias
    expected = torch.nn.functional.conv2d(features[0].float(), weight.bfloat16().float(), bias.float(), padding=1)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(output, output.bfloat16().float())


def test_exact_output_learns_and_is_saved_under_the_same_names(tmp_path: Path) -> None:
    """Training goes through it under autocast, and its weights must not change their names in the file."""
    unet = save_unet(tmp_path).train()
    names = list(unet.state_dict())
    exact_output(unet)
    x, t, text = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        output = unet(x, t, text).sample
    output.square().mean().backward()
    assert output.dtype == torch.float32
    assert unet.conv_out.weight.grad is not None
    assert list(unet.state_dict()) == names
