"""LoRA files with odd settings, folders of them, and parts that a model lacks."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcm_core.errors import InputError
from lcm_core.files.lora import check_parts, find_lora_file, merge, read_lora
from lcm_core.files.safetensors import write_safetensors
from tests.core.test_lora_kinds import plain


def test_folders_stand_for_the_lora_in_them(tmp_path: Path) -> None:
    """diffusers' and the LCM-LoRA script's output is a folder, and that is what people pass."""
    with pytest.raises(InputError, match="no LoRA in this folder"):
        find_lora_file(tmp_path)
    write_safetensors(tmp_path / "b.safetensors", plain())
    assert find_lora_file(tmp_path).name == "b.safetensors"
    write_safetensors(tmp_path / "a.safetensors", plain())
    with pytest.raises(InputError, match=r"it holds a\.safetensors, b\.safetensors; give one"):
        find_lora_file(tmp_path)
    write_safetensors(tmp_path / "pytorch_lora_weights.safetensors", plain())
    assert read_lora(tmp_path).layers["unet"]


def many(count: int, odd: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(count))
    names = [*(f"lora_unet_blocks_{i}" for i in range(count)), odd]
    halves = (("lora_down", torch.ones(1, 3)), ("lora_up", torch.ones(3, 1)))
    return model, {f"{name}.{half}.weight": tensor for name in names for half, tensor in halves}


def test_few_modules_that_a_model_lacks_are_named_and_left_out() -> None:
    """Silence would hide them, a refusal would keep people from files that otherwise fit."""
    model, tensors = many(20, "lora_unet_extra_proj")
    before = model.blocks[3].weight.clone()
    with pytest.warns(UserWarning, match=r"1 of its 21 modules for the unet .* left out: extra_proj"):
        merge(model, [(read_lora(tensors), 1.0)])
    torch.testing.assert_close(model.blocks[3].weight, before + 1)
    model, tensors = many(2, "lora_unet_double_blocks_0_img_attn_proj")
    before = model.blocks[0].weight.clone()
    with pytest.raises(InputError, match=r"another architecture \(Flux.*: 1 of its 3 modules"):
        merge(model, [(read_lora(tensors), 1.0)])
    assert torch.equal(model.blocks[0].weight, before)


def test_a_text_encoder_that_the_model_lacks_is_said() -> None:
    """The part for SDXL's second encoder was dropped without a word."""
    second = {key.replace("lora_unet_", "lora_te2_"): value for key, value in plain().items()}
    with pytest.warns(UserWarning, match="1 modules of text_encoder_2 are left out"):
        check_parts(read_lora({**plain(), **second}), ("unet", "text_encoder"))
    with pytest.raises(InputError, match=r"another architecture.*text_encoder_2"):
        check_parts(read_lora(second), ("unet", "text_encoder"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_parts(read_lora(plain()), ("unet", "text_encoder"))


def test_embeddings_beside_the_lora_are_said() -> None:
    """OneTrainer bundles them; they are no LoRA, and are not read here."""
    bundled = {"bundle_emb.word.string_to_param.*": torch.ones(1, 12)}
    with pytest.warns(UserWarning, match=r"1 tensors are no LoRA and are left out: bundle_emb\.word"):
        assert read_lora({**plain(), **bundled}).layers["unet"]


def test_names_on_a_hub_and_index_files(tmp_path: Path) -> None:
    """`owner/name` is what model cards show; the message must say how to get it, for there is no network here."""
    from lcm_core.pipeline.sources import find_lora, find_model

    with pytest.raises(InputError, match=r"hf download some/model --local-dir FOLDER"):
        find_model("some/model")
    with pytest.raises(InputError, match=r"hf download some/lora --local-dir FOLDER"):
        find_lora("some/lora", tmp_path)
    with pytest.raises(InputError) as plain_path:
        find_model("models/absent.safetensors")
    assert "download" not in str(plain_path.value)
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    assert find_model(tmp_path / "model_index.json") == tmp_path


def test_a_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    """Its length in bytes, 0x280, is how a pickle begins; such files were refused."""
    file = tmp_path / "lora.safetensors"
    for padding in range(700):
        write_safetensors(file, plain(), {"note": "x" * padding})
        if file.read_bytes()[:2] == b"\x80\x02":
            break
    assert file.read_bytes()[:2] == b"\x80\x02"
    assert read_lora(file).layers["unet"]


@pytest.mark.parametrize("prefix", ["lora_te_", "text_encoder.", "text_encoder.base_model.model."])
def test_text_encoder_dora_equals_peft(prefix: str) -> None:
    """The whole encoder's output, every projection adapted: one missed module would change the words' meaning."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=9, **sizes)).eval().requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    reference: Any = get_peft_model(copy.deepcopy(text), LoraConfig(r=2, target_modules=targets, use_dora=True)).eval()
    for name, parameter in reference.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data + torch.rand(parameter.shape) * 0.5
    state = {}
    for key, value in get_peft_model_state_dict(reference).items():
        path, _, role = key.removeprefix("base_model.model.").rpartition(".lora_")
        path = "text_model." + path.removeprefix("text_model.")
        kohya = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}.get(role, "dora_scale")
        flat = prefix.startswith("lora_")
        state[f"{prefix}{path.replace('.', '_')}.{kohya}" if flat else f"{prefix}{path}.lora_{role}"] = value
    merge(text, [(read_lora(state, alpha=8), 1.0)], "text_encoder")
    ids = torch.tensor([[1, 2, 3, 4, 8]])
    expected = reference(ids).last_hidden_state
    torch.testing.assert_close(text(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["diffusers", "single-file"])
def test_export_merges_the_text_encoder(layout: str, tmp_path: Path) -> None:
    """A file that is exported with a style LoRA must hold its words' half too, in the encoder's own number format."""
    from lcm_core.cli.main import main
    from lcm_core.files.checkpoint import read_component
    from lcm_core.pipeline.model import find_source

    key = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    before = read_component(find_source("emoji").text, "text_encoder").tensors
    name = key if key in before else key.removeprefix("text_model.")
    width = before[name].shape[0]
    module = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    down, up = torch.randn(2, width) * 0.1, torch.randn(width, 2)
    tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    write_safetensors(tmp_path / "style.safetensors", tensors)
    target = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    lora = ["--lora", f"{tmp_path / 'style.safetensors'}:0.5"]
    assert main(["export", "--to", layout, "--path", str(target), *lora]) == 0
    after = read_component(target, "text_encoder").tensors
    name_after = key if key in after else key.removeprefix("text_model.")
    assert after[name_after].dtype == before[name].dtype
    expected = before[name].float() + 0.5 * up @ down
    torch.testing.assert_close(after[name_after].float(), expected, rtol=2e-3, atol=2e-3)  # stored in half precision
