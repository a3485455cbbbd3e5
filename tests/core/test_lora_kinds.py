"""DoRA, LoHa, LoKr, LoCon against lycoris-lora and peft; layouts of other trainers; and broken LoRA files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcm_core.errors import InputError
from lcm_core.files.lora import merge, read_lora, unmerge
from lcm_core.files.lora_keys import parse_key
from lcm_core.files.safetensors import write_safetensors

LINEAR, CONV = "down_blocks.0.to_q", "down_blocks.0.resnets.0.conv1"


class Net(nn.Module):
    """A linear layer and a convolution under a U-Net's names."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.to_q = nn.Linear(12, 20)
        resnet = nn.Module()
        resnet.conv1 = nn.Conv2d(12, 20, 3, padding=1)
        block.resnets = nn.ModuleList([resnet])
        self.down_blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        block = self.down_blocks[0]
        return block.resnets[0].conv1(x) + block.to_q(x.mean((2, 3)))[..., None, None]


def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def lycoris_module(kind: str, layer: nn.Module, **settings: Any) -> Any:
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    made = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}[kind]
    module = made("x", layer, 1.0, **({"lora_dim": 3, "alpha": 2} | settings))
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.4
    if getattr(module, "dora_scale", None) is not None:
        module.dora_scale.data = module.dora_scale.data.abs() + 1
    return module


def state_of(module: Any, prefix: str) -> dict[str, Tensor]:
    state = module.custom_state_dict() if hasattr(module, "custom_state_dict") else module.state_dict()
    names = {name: value.detach().clone() for name, value in state.items() if value is not None}
    return {f"{prefix}.{name}": value for name, value in names.items() if not name.startswith("org_module")}


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("locon", {}),
    ("locon", {"use_tucker": True}),
    ("locon", {"weight_decompose": True, "wd_on_out": True}),
    ("locon", {"weight_decompose": True, "wd_on_out": False}),
    ("loha", {}),
    ("loha", {"use_tucker": True}),
    ("loha", {"weight_decompose": True, "wd_on_out": False}),
    ("lokr", {"factor": 2, "lora_dim": 2}),
    ("lokr", {"factor": 2, "lora_dim": 2, "use_tucker": True}),
    ("lokr", {"factor": 2, "lora_dim": 1, "decompose_both": True}),
    ("lokr", {"factor": 4, "lora_dim": 1000}),  # both factors whole: alpha has no say
    ("lokr", {"factor": 2, "lora_dim": 2, "weight_decompose": True, "wd_on_out": True}),
]


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_unet_", "lycoris_"])
@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=str)
def test_merged_weights_equal_lycoris(kind: str, settings: dict[str, Any], prefix: str) -> None:
    """A wrong factor order, scale, norm axis or kernel layout would paint something else than the trainer saw."""
    model, state = net(), {}
    reference, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    for path in (LINEAR, CONV):
        module = lycoris_module(kind, reference.get_submodule(path), **settings)
        state |= state_of(module, prefix + path.replace(".", "_"))
        module.apply_to()  # its forward pass is what trained; its own merging scales a LoHa and a LoKr twice
    lora, x = read_lora(state), torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        expected = reference(x)
        tolerance = {"rtol": 1e-5, "atol": 1e-5 * expected.abs().max().item()}
        assert (expected - model(x)).abs().max() > 0.1
        merge(model, [(lora, 1.0)])
        torch.testing.assert_close(model(x), expected, **tolerance)
        merged = copy.deepcopy(model.state_dict())
        merge(model, [(lora, 0.25)])  # a straight line, as ComfyUI and the web UIs draw it for every kind
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, torch.lerp(before[key], merged[key], 0.25), rtol=1e-5, atol=1e-5)
        kohya = {
            f"lora_unet_{n}.{k}": v for n, layer in lora.layers["unet"].items() for k, v in layer.to_kohya().items()
        }
        merge(model, [(read_lora(kohya), 1.0)])
        torch.testing.assert_close(model(x), expected, **tolerance)
    unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["dora", "loha", "loha conv", "lokr", "lokr whole", "lokr conv"])
def test_merged_output_equals_peft(kind: str, tmp_path: Path) -> None:
    """peft writes the same kinds under other names and keeps alpha outside the tensors."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

    targets, conv = {"target_modules": ["to_q", "conv1"]}, {"use_effective_conv2d": kind.endswith("conv")}
    config: Any
    if kind == "dora":
        config = LoraConfig(r=3, lora_alpha=6, use_dora=True, **targets)
    elif kind.startswith("loha"):
        config = LoHaConfig(r=3, alpha=6, **targets, **conv)
    else:
        config = LoKrConfig(r=50 if kind == "lokr whole" else 2, alpha=6, decompose_factor=2, **targets, **conv)
    model = net()
    reference = get_peft_model(copy.deepcopy(model), config).eval()
    for name, parameter in reference.named_parameters():
        if "magnitude" in name:
            parameter.data = parameter.data * (1 + torch.rand(parameter.shape))
        elif any(mark in name for mark in ("lora_", "hada_", "lokr_")):
            parameter.data = torch.randn(parameter.shape) * 0.4
    reference.save_pretrained(tmp_path)
    merge(model, [(read_lora(tmp_path), 1.0)])
    x = torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        expected = reference(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("key", "address"),
    [
        ("unet.base_model.model.a.b.lora_A.weight", ("unet", "a.b", "down")),
        ("diffusion_model.input_blocks.1.lora_B.weight", ("unet", "input_blocks.1", "up")),
        ("unet.a.b.lora_down.weight", ("unet", "a.b", "down")),
        ("lycoris_te2_text_model_a.hada_w1_b", ("text_encoder_2", "text_model_a", "hada_w1_b")),
        ("lycoris_text_model_a.lokr_t2", ("text_encoder", "text_model_a", "lokr_t2")),
        ("text_encoder.base_model.model.text_model.a.lora_A.weight", ("text_encoder", "text_model.a", "down")),
        ("text_encoders.clip_g.transformer.text_model.a.lora_up.weight", ("text_encoder_2", "text_model.a", "up")),
        ("unet.a.lora_magnitude_vector", ("unet", "a", "magnitude")),
        ("base_model.model.a.lora_magnitude_vector.default.weight", ("unet", "a", "magnitude")),
        ("lora_te1_text_model_a.dora_scale", ("text_encoder", "text_model_a", "dora_scale")),
    ],
)
def test_key_layouts_of_other_trainers(key: str, address: tuple[str, str, str]) -> None:
    """The LCM-LoRA script's, OneTrainer's, LyCORIS' and ComfyUI's names; a wrong part would go into another network."""
    assert tuple(parse_key(key)) == address


def plain(**changes: Tensor) -> dict[str, Tensor]:
    tensors = {"lora_down.weight": torch.ones(2, 12), "lora_up.weight": torch.ones(20, 2), "alpha": torch.tensor(2.0)}
    return {f"lora_unet_down_blocks_0_to_q.{key}": changes.get(key[:7], value) for key, value in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64])
def test_factors_without_fractions_are_refused(dtype: torch.dtype) -> None:
    """int8 had no effect and uint8 wrecked the picture, both without a word."""
    with pytest.raises(InputError, match=rf"'lora_unet_\w+\.lora_up\.weight' is stored as {str(dtype)[6:]}.*float16"):
        read_lora(plain(lora_up=torch.ones(20, 2).to(dtype)))


def test_float8_and_a_whole_alpha_are_read() -> None:
    """Both are in use; only factors have to be fractions."""
    model, other = net(), net()
    merge(model, [(read_lora(plain(lora_up=torch.ones(20, 2).to(torch.float8_e4m3fn), alpha=torch.tensor(2))), 1.0)])
    merge(other, [(read_lora(plain()), 1.0)])
    assert torch.equal(model.get_submodule(LINEAR).weight, other.get_submodule(LINEAR).weight)
    with pytest.raises(InputError, match="NaN"):
        read_lora(plain(lora_up=torch.full((20, 2), torch.nan).to(torch.float8_e4m3fn)))


def test_rank_0_and_odd_alpha_are_refused() -> None:
    """They ended in a division by zero and in a traceback about scalars."""
    with pytest.raises(InputError, match=r"is empty \(rank 0"):
        read_lora({**plain(lora_do=torch.ones(0, 12), lora_up=torch.ones(20, 0))})
    with pytest.raises(InputError, match=r"alpha' has shape \(2,\) instead of one number"):
        read_lora(plain(alpha=torch.ones(2)))
    with pytest.raises(InputError, match="alpha' is NaN or infinite"):
        read_lora(plain(alpha=torch.tensor(torch.inf)))


def test_alpha_0_is_noted() -> None:
    """Such a LoRA does nothing; silence would leave the user searching elsewhere."""
    with pytest.warns(UserWarning, match="alpha is 0 in 1 of 1 modules"):
        read_lora(plain(alpha=torch.tensor(0.0)))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1]", "no JSON object"),
        ('{"unet.lora_alpha": "much"}', "lora_alpha 'much'"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}', "no regular expression"),
        ('{"unet.alpha_pattern": [2]}', "alpha_pattern that is no JSON object"),
        ('{"unet": 3, "unet.lora_alpha": 2}', None),
    ],
)
def test_broken_settings_are_refused(metadata: str, words: str | None, tmp_path: Path) -> None:
    """Each ended in a traceback; the message has to name the file and what is wrong in it."""
    tensors = {"unet.down_blocks.0.to_q.lora_A.weight": torch.ones(2, 12)}
    tensors["unet.down_blocks.0.to_q.lora_B.weight"] = torch.ones(20, 2)
    write_safetensors(tmp_path / "odd.safetensors", tensors, {"lora_adapter_metadata": metadata})
    if words is None:
        read_lora(tmp_path / "odd.safetensors")
        return
    with pytest.raises(InputError, match=rf"odd\.safetensors: .*{words}"):
        read_lora(tmp_path / "odd.safetensors")
