"""LoRA against peft and diffusers: layouts, alpha, strengths, exact removal, training, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcm_core.errors import InputError
from lcm_core.files import ldm_keys
from lcm_core.files.lora import merge, read_lora, unmerge
from lcm_core.files.lora_keys import parse_key
from lcm_core.files.safetensors import write_safetensors
from lcm_core.networks.lora_layers import TARGET_MODULES

LAYOUTS = ("kohya", "kohya ldm", "diffusers", "diffusers old", "peft", "peft state")


def tiny_unet(**settings: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    base: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**(base | settings)).eval().requires_grad_(False)


def run(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([9, 700]), text).sample


def with_peft(unet: nn.Module, rank: int, alpha: float, **settings: Any) -> Any:
    """The independent reference: the network inside peft, both halves random."""
    import copy

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGET_MODULES), **settings)
    model = get_peft_model(copy.deepcopy(unet), config).eval()
    generator = torch.Generator().manual_seed(rank)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 / rank**0.5
    return model


def kohya_tensors(peft_model: Any, alpha: float) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            path, _, letter = (
                name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".lora_")
            )
            module = "lora_unet_" + path.replace(".", "_")
            tensors[f"{module}.lora_{'down' if letter == 'A' else 'up'}.weight"] = parameter.detach()
            tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
    return tensors


def ldm_names(tensors: dict[str, Tensor], unet: nn.Module) -> dict[str, Tensor]:
    """kohya's trainer for SDXL names modules as the ldm layout does."""
    paths = [name for name, _ in unet.named_modules()]
    topology = ldm_keys.UNetTopology.from_diffusers(f"{path}." for path in paths)
    back = ldm_keys.inverted(ldm_keys.unet_map(topology))
    flat = {path.replace(".", "_"): str(ldm_keys.rename(path, back)).replace(".", "_") for path in paths if path}
    renamed = {}
    for key, value in tensors.items():
        module, _, leaf = key.removeprefix("lora_unet_").partition(".")
        renamed[f"lora_unet_{flat[module]}.{leaf}"] = value
    return renamed


def written(layout: str, peft_model: Any, alpha: float, folder: Path) -> tuple[Any, float | None]:
    """The same LoRA in a layout: what to give to read_lora, and alpha where the layout cannot hold it."""
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    kohya = kohya_tensors(peft_model, alpha)
    file = folder / "lora.safetensors"
    if layout == "peft":
        peft_model.save_pretrained(folder)
        return folder, None
    if layout == "peft state":
        return {k: v for k, v in peft_model.state_dict().items() if "lora_" in k}, alpha
    if layout == "diffusers":
        metadata = peft_model.peft_config["default"].to_dict()
        metadata = {k: v for k, v in metadata.items() if isinstance(v, (int, float, str, dict)) or v is None}
        state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(peft_model).items()}
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=state, unet_lora_adapter_metadata=metadata, weight_name=file.name
        )
        return file, None
    if layout == "diffusers old":
        named = {name.replace(".", "_"): name for name, _ in peft_model.base_model.model.named_modules()}
        old = {}
        for key, value in kohya.items():
            module, _, leaf = key.removeprefix("lora_unet_").partition(".")
            path = named[module]
            if leaf == "alpha":
                continue
            half = "lora.down.weight" if "down" in leaf else "lora.up.weight"
            if path.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
                parent, _, name = path.removesuffix(".0").rpartition(".")
                old[f"unet.{parent}.processor.{name}_{half}"] = value
            else:
                old[f"unet.{path}.{half}"] = value
        return old, alpha
    write_safetensors(file, ldm_names(kohya, peft_model.base_model.model) if layout == "kohya ldm" else kohya)
    return file, None


@pytest.mark.parametrize(("rank", "alpha"), [(1, 4), (16, 8), (64, 16)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_output_equals_peft(layout: str, rank: int, alpha: float, tmp_path: Path) -> None:
    """A missed module, a wrong scale or swapped halves would paint another picture than the trainer saw."""
    torch.manual_seed(0)
    unet = tiny_unet()
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    plain, reference = run(unet), with_peft(unet, rank, alpha)
    source, given_alpha = written(layout, reference, alpha, tmp_path)
    merge(unet, [(read_lora(source, given_alpha), 1.0)])
    expected = run(reference)
    torch.testing.assert_close(run(unet), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert (expected - plain).abs().max() > 0.1 * expected.abs().max()
    unmerge(unet)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


def test_every_target_is_covered() -> None:
    """Convolutions of every kind and linear layers must be among what the parity test compares."""
    names = kohya_tensors(with_peft(tiny_unet(), 2, 2), 2).keys()
    for end in TARGET_MODULES:
        assert any(key.split(".")[0].endswith("_" + end.replace(".", "_")) for key in names), end


def test_patterns_and_rank_stabilised_scale_equal_peft(tmp_path: Path) -> None:
    """peft's per-module alpha and its rsLoRA scale must be honoured, not only the plain alpha."""
    torch.manual_seed(0)
    unet = tiny_unet()
    reference = with_peft(unet, 4, 2, use_rslora=True, alpha_pattern={"to_q": 9, "mid_block.*conv1": 1})
    reference.save_pretrained(tmp_path)
    merge(unet, [(read_lora(tmp_path), 1.0)])
    expected = run(reference)
    torch.testing.assert_close(run(unet), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_several_loras_add_up_with_their_strengths() -> None:
    """t' = l1 * t_style + l2 * t_lcm (arXiv 2311.05556): two at once must equal both additions in any order."""
    torch.manual_seed(0)
    unet = tiny_unet()
    style, lcm = (read_lora(kohya_tensors(with_peft(unet, rank, 2), 2)) for rank in (2, 5))
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    original = unet.get_submodule(key).weight.double().clone()
    merge(unet, [(style, 0.8), (lcm, -0.5)])
    flat = key.replace(".", "_")
    layers = [lora.layers["unet"][flat] for lora in (style, lcm)]
    deltas = [layer.up.double() @ layer.down.double() * 2 / layer.down.shape[0] for layer in layers]
    expected = original + 0.8 * deltas[0] - 0.5 * deltas[1]
    torch.testing.assert_close(unet.get_submodule(key).weight.double(), expected, rtol=0, atol=1e-6)
    first = run(unet)
    merge(unet, [(lcm, -0.5), (style, 0.8)])  # merging again replaces, it does not add
    torch.testing.assert_close(run(unet), first, rtol=0, atol=1e-5)
    merge(unet, [])
    assert torch.equal(unet.get_submodule(key).weight.double(), original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_is_exact_in_every_dtype_and_layout_of_memory(dtype: torch.dtype) -> None:
    """Subtracting would leave rounding behind; and a lost memory format would slow every convolution."""
    torch.manual_seed(0)
    unet = tiny_unet().to(dtype).to(memory_format=torch.channels_last)
    lora = read_lora(kohya_tensors(with_peft(tiny_unet(), 4, 2), 2))
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    strides = {k: v.stride() for k, v in unet.state_dict().items()}
    for _ in range(2):
        merge(unet, [(lora, 0.7), (lora, 0.1)])
    changed = [k for k, v in unet.state_dict().items() if not torch.equal(v, before[k])]
    assert len(changed) == len(lora.layers["unet"])
    assert {k: v.stride() for k, v in unet.state_dict().items()} == strides
    unmerge(unet)
    unmerge(unet)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


@pytest.mark.parametrize("strength", [float("inf"), float("nan"), 1e30, -101.0])
def test_a_strength_that_no_weight_survives_is_merged(strength: float) -> None:
    """The picture was said to be NaN, and another number format to be the remedy."""
    lora = read_lora({"lora_unet_a.lora_down.weight": torch.ones(1, 3), "lora_unet_a.lora_up.weight": torch.ones(3, 1)})
    model = nn.Module()
    model.a = nn.Linear(3, 3)
    before = model.a.weight.clone()
    with pytest.raises(InputError, match="is out of range; 0 is off, 1 is as trained"):
        merge(model, [(lora, strength)])
    assert torch.equal(model.a.weight, before)


def test_linear_and_1x1_convolution_loras_fit_each_other() -> None:
    """SD 1.x's proj_in is a convolution, many trainers store it as linear; kohya stores linear ones as 1x1 as well."""
    torch.manual_seed(0)
    unet = tiny_unet()
    tensors = kohya_tensors(with_peft(unet, 2, 2), 2)
    merge(unet, [(read_lora(tensors), 1.0)])
    expected = run(unet)
    swapped = {}
    for key, value in tensors.items():
        if "proj_in" in key and value.ndim == 4:
            value = value.flatten(1)
        elif "to_q" in key and value.ndim == 2:
            value = value[..., None, None]
        swapped[key] = value
    assert any(swapped[k].ndim != v.ndim for k, v in tensors.items() if "proj_in" in k)
    merge(unet, [(read_lora(swapped), 1.0)])
    torch.testing.assert_close(run(unet), expected)


@pytest.mark.parametrize(
    ("key", "address"),
    [
        ("lora_unet_a_b.lora_down.weight", ("unet", "a_b", "down")),
        ("lora_unet_a_b.alpha", ("unet", "a_b", "alpha")),
        ("lora_te2_text_model_a.lora_up.weight", ("text_encoder_2", "text_model_a", "up")),
        ("unet.a.b.lora_A.weight", ("unet", "a.b", "down")),
        ("unet.a.b.alpha", ("unet", "a.b", "alpha")),
        ("unet.a.attn1.processor.to_out_lora.up.weight", ("unet", "a.attn1.to_out.0", "up")),
        ("a.attn2.processor.to_q_lora.down.weight", ("unet", "a.attn2.to_q", "down")),
        ("base_model.model.a.b.lora_B.default.weight", ("unet", "a.b", "up")),
        ("base_model.model.unet.a.lora_B.weight", ("unet", "a", "up")),
        ("diffusion_model.input_blocks.1.1.proj_in.lora_up.weight", ("unet", "input_blocks.1.1.proj_in", "up")),
        ("text_encoder_2.text_model.a.lora_linear_layer.down.weight", ("text_encoder_2", "text_model.a", "down")),
        ("text_encoder.text_model.a.lora_A.weight", ("text_encoder", "text_model.a", "down")),
    ],
)
def test_key_layouts(key: str, address: tuple[str, str, str]) -> None:
    """Every way in which the tools name a tensor; one that is taken for another module would not be merged at all."""
    assert tuple(parse_key(key)) == address


def test_absent_alpha_is_the_rank() -> None:
    """Without alpha the halves are used as they are; a default of 1 would weaken the LoRA by its rank."""
    state = {"lora_unet_a.lora_down.weight": torch.ones(4, 3), "lora_unet_a.lora_up.weight": torch.ones(2, 4)}
    layer = read_lora(state).layers["unet"]["a"]
    torch.testing.assert_close(layer.delta((2, 3)), torch.full((2, 3), 4.0))
    torch.testing.assert_close(read_lora(state, alpha=1).layers["unet"]["a"].delta((2, 3)), torch.ones(2, 3))


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "text_encoder.", "base_model.model."])
def test_text_encoder_layers_are_kept_and_merged(prefix: str) -> None:
    """A style LoRA's text part must reach the text encoder, whatever transformers calls its modules."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = {
        "vocab_size": 9,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = CLIPTextModel(CLIPTextConfig(**config))
    path = "text_model.encoder.layers.1.self_attn.q_proj"
    if prefix.startswith("lora_"):
        module, halves = prefix + path.replace(".", "_"), ("lora_down", "lora_up")
    else:
        module, halves = prefix + path, ("lora_linear_layer.down", "lora_linear_layer.up")
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    lora = read_lora({f"{module}.{halves[0]}.weight": down, f"{module}.{halves[1]}.weight": up})
    layer = getattr(text, "text_model", text).encoder.layers[1].self_attn.q_proj
    before = layer.weight.clone()
    merge(text, [(lora, 0.5)], part="text_encoder")
    torch.testing.assert_close(layer.weight, before + 0.5 * up @ down)
    unmerge(text)
    assert torch.equal(layer.weight, before)
    merge(tiny_unet(), [(lora, 1.0)])  # no U-Net part: nothing to do, and no error


def test_second_text_encoder_is_told_apart() -> None:
    """SDXL's two encoders have modules of the same name."""
    state = {}
    for part, size in (("lora_te1_", 3), ("lora_te2_", 5), ("lora_unet_", 7)):
        state |= {f"{part}a.lora_down.weight": torch.ones(1, size), f"{part}a.lora_up.weight": torch.ones(size, 1)}
    layers = read_lora(state).layers
    assert {part: layers[part]["a"].down.shape[1] for part in layers} == {
        "text_encoder": 3,
        "text_encoder_2": 5,
        "unet": 7,
    }
