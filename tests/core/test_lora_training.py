"""LoRA of text encoders, what is refused, and trainable adapters against peft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcm_core.errors import InputError
from lcm_core.files.lora import merge, read_lora, save_lora
from lcm_core.files.safetensors import read_safetensors, write_safetensors
from lcm_core.networks.lora_layers import add_lora, load_lora_state_dict, lora_state_dict, remove_lora
from tests.core.test_lora import kohya_tensors, run, tiny_unet, with_peft


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_unet_a.hada_w1_a", "hada_w1_a too"),
        ("lora_unet_a.lokr_w1", "lokr_w1 too"),
        ("base_model.model.a.lora_B.default.bias", "LoRA with biases"),
        ("lora_unet_b.on_input", "IA3"),
        ("lora_unet_b.a1.weight", "GLoRA"),
        ("lora_unet_a.oft_blocks", "OFT"),
        ("lora_unet_a.diff", "full difference"),
        ("model.diffusion_model.out.2.weight", "no key of a LoRA"),
    ],
)
def test_other_adapters_are_refused_by_name(key: str, words: str, tmp_path: Path) -> None:
    """Ignoring the keys that are not understood would apply half an adapter."""
    plain = {"lora_unet_a.lora_down.weight": torch.ones(1, 2), "lora_unet_a.lora_up.weight": torch.ones(2, 1)}
    write_safetensors(tmp_path / "odd.safetensors", {**plain, key: torch.ones(1)})
    with pytest.raises(InputError, match=rf"odd\.safetensors: .*{words}"):
        read_lora(tmp_path / "odd.safetensors")


def test_broken_loras_are_refused(tmp_path: Path) -> None:
    """Half a layer, halves that do not join, NaN and an empty file each get their own line."""
    down, up = {"lora_unet_a.lora_down.weight": torch.ones(2, 3)}, {"lora_unet_a.lora_up.weight": torch.ones(3, 2)}
    with pytest.raises(InputError, match="'a' has only down"):
        read_lora(down)
    with pytest.raises(InputError, match=r"halves .* that do not join"):
        read_lora({**down, "lora_unet_a.lora_up.weight": torch.ones(3, 4)})
    with pytest.raises(InputError, match="NaN"):
        read_lora({**up, "lora_unet_a.lora_down.weight": torch.full((2, 3), torch.nan)})
    with pytest.raises(InputError, match="no tensors"):
        read_lora({})
    torch.save(down, tmp_path / "lora.pt")
    with pytest.raises(InputError, match="pickle"):
        read_lora(tmp_path / "lora.pt")


def test_a_lora_for_another_architecture_changes_nothing() -> None:
    """The first module that does not fit is named with both shapes, and the network stays as it was."""
    torch.manual_seed(0)
    unet = tiny_unet()
    before = run(unet)
    other = read_lora(kohya_tensors(with_peft(tiny_unet(cross_attention_dim=40), 2, 2), 2))
    with pytest.raises(InputError, match=r"another architecture: its module '\w+attn2_to_k' .*\(32, 40\).*\(32, 24\)"):
        merge(unet, [(other, 1.0)])
    deeper = read_lora(kohya_tensors(with_peft(tiny_unet(down_block_types=("CrossAttnDownBlock2D",) * 2), 2, 2), 2))
    with pytest.raises(InputError, match=r"are not in this model .first: 'down_blocks_1_attentions_0_\w+'"):
        merge(unet, [(deeper, 1.0)])
    assert torch.equal(run(unet), before)


def test_trainable_adapters_equal_peft_in_output_and_gradient() -> None:
    """A forward that is right with a backward that is not would train something else."""
    torch.manual_seed(0)
    unet = tiny_unet()
    reference = with_peft(unet, 3, 6)
    plain = run(unet)
    adapters = add_lora(unet, 3, 6)
    assert torch.equal(run(unet), plain)
    load_lora_state_dict(unet, kohya_tensors(reference, 6))
    torch.testing.assert_close(run(unet), run(reference), rtol=1e-5, atol=1e-5)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([50]), torch.randn(1, 5, 24)
    for model in (unet, reference):
        model(x, t, text).sample.square().sum().backward()
    for path, layer in adapters.layers.items():
        other = reference.base_model.model.get_submodule(path)
        scale = layer.down.weight.grad.abs().max().item()
        torch.testing.assert_close(
            layer.down.weight.grad, other.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-4 * scale
        )
    assert all(p.grad is None for name, p in unet.named_parameters() if ".down." not in name and ".up." not in name)
    assert len(adapters.parameters()) == 2 * len(adapters.layers)


def test_one_network_is_teacher_student_and_target() -> None:
    """Teacher = adapters off, target = their average: if a switch leaks, the student would chase itself."""
    torch.manual_seed(0)
    unet = tiny_unet()
    teacher = run(unet)
    adapters = add_lora(unet, 2, 1)
    with pytest.raises(ValueError, match="start_ema"), adapters.using("ema"):
        run(unet)
    adapters.start_ema()
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    online = run(unet)
    with adapters.using("off"):
        assert torch.equal(run(unet), teacher)
        with adapters.using("ema"):  # the average still holds the first weights, which change nothing
            assert torch.equal(run(unet), teacher)
    assert torch.equal(run(unet), online)
    first = {k: v.clone() for k, v in lora_state_dict(unet, ema=True).items()}
    adapters.update_ema(0.75)
    for key, value in lora_state_dict(unet, ema=True).items():
        if key.endswith("weight"):
            torch.testing.assert_close(value, 0.75 * first[key] + 0.25 * lora_state_dict(unet)[key])
    remove_lora(unet)
    assert torch.equal(run(unet), teacher)
    assert set(unet.state_dict()) == set(tiny_unet().state_dict())


def test_trained_adapters_survive_the_file(tmp_path: Path) -> None:
    """What is saved after training must, merged into the plain network, paint what the trained one painted."""
    torch.manual_seed(0)
    unet = tiny_unet()
    plain = {k: v.clone() for k, v in unet.state_dict().items()}
    adapters = add_lora(unet, 4, 8, target_modules=("to_q", "to_out.0", "conv1"))
    assert all(path.endswith((".to_q", ".to_out.0", ".conv1")) for path in adapters.layers)
    for parameter in adapters.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    trained = run(unet)
    save_lora(tmp_path / "lora.safetensors", lora_state_dict(unet), "sd1", {"note": "kept"})
    metadata = read_safetensors(tmp_path / "lora.safetensors")[1]
    expected = {"ss_network_dim": "4", "ss_network_alpha": "8.0", "ss_base_model_version": "sd_v1", "note": "kept"}
    assert expected.items() <= metadata.items()
    fresh = tiny_unet()
    fresh.load_state_dict(plain)
    merge(fresh, [(read_lora(tmp_path / "lora.safetensors"), 1.0)])
    torch.testing.assert_close(run(fresh), trained, rtol=1e-5, atol=1e-5)
    assert all(
        v.dtype == torch.float16 for k, v in lora_state_dict(unet, dtype=torch.float16).items() if "alpha" not in k
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_train_on_a_bfloat16_network(autocast: bool) -> None:
    """float32 adapters on a bfloat16 network, and under autocast, are the two ways in which LoRAs are trained."""
    torch.manual_seed(0)
    unet = tiny_unet().to(torch.float32 if autocast else torch.bfloat16)
    adapters = add_lora(unet, 2)
    dtype = torch.float32 if autocast else torch.bfloat16
    x, text = torch.randn(1, 4, 8, 8, dtype=dtype), torch.randn(1, 5, 24, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = unet(x, torch.tensor([3]), text).sample
    output.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in adapters.parameters())
    assert any(p.grad.abs().max() > 0 for p in adapters.parameters())


def test_size_of_an_lcm_lora_is_the_paper_s() -> None:
    """67.5 M weights on SD 1.5 at rank 64 (arXiv 2311.05556, Table 1): other target modules would miss that by far."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        adapters = add_lora(unet, 64)
    assert sum(p.numel() for p in adapters.parameters()) == pytest.approx(67.5e6, rel=0.005)


def test_wrong_requests_are_refused() -> None:
    """A misspelt target that matches nothing would train nothing for hours."""
    with pytest.raises(InputError, match="rank 0"):
        add_lora(tiny_unet(), 0)
    with pytest.raises(InputError, match="no modules named to_qq"):
        add_lora(tiny_unet(), 2, target_modules=["to_qq"])
    with pytest.raises(InputError, match="no LoRA layer"):
        save_lora("nowhere.safetensors", {})
