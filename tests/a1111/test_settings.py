"""What is set for an LCM: found in the prompt and on the disk, and kept where it is right already."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file

from extension_a1111.architecture import check_loras, check_network, context_width, network_width
from extension_a1111.loras import Accelerated, find_loras, kind_of_name, read_accelerated
from extension_a1111.recommendation import USUAL_FULL, USUAL_LORA, Recommendation, recommend
from lcm_core.errors import InputError
from lcm_core.files.recommended import Recommended

EMOJI = Path(__file__).parents[2] / "lcm_core" / "models" / "emoji"
LORA = EMOJI / "lora" / "lcm_lora.safetensors"


def test_loras_of_a_prompt() -> None:
    found = find_loras("a <lora:LCM_sd15:1> b <lora:style v2:0.8:te=0> <LORA:off:0> <hypernet:x:1> <lora:bare>")
    assert [(lora.name, lora.strength) for lora in found] == [
        ("LCM_sd15", "1"),
        ("style v2", "0.8:te=0"),
        ("bare", "1"),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lcm-lora-sdv1-5", "lcm"),
        ("LCM_LoRA_SDXL", "lcm"),
        ("sd15_lcm", "lcm"),
        ("TCD-SD15-LoRA", "tcd"),
        ("Hyper-SD15-8steps-lora", "tcd"),
        ("hyperrealism_v2", None),
        ("alcmist", None),
    ],
)
def test_kind_by_name(name: str, kind: str | None) -> None:
    assert kind_of_name(name) == kind


def test_what_the_file_states_counts_more_than_names(tmp_path: Path) -> None:
    """A LoRA distilled with this trainer is recognised whatever it is called, and as what it is."""
    for kind in ("lcm", "tcd"):
        file = tmp_path / f"{kind}.safetensors"
        said = Recommended(kind, 2, 0.0)
        save_file({"a": torch.zeros(1)}, file, metadata={**said.metadata(), "modelspec.title": "lcm tcd"})
        assert read_accelerated("my own lcm style", file) == Accelerated("my own lcm style", said)
    for key, value in (("steps", "few"), ("steps", 0), ("gamma", 1.5), ("original_steps", 2000)):
        said = Recommended("tcd", **{key: value})  # type: ignore[arg-type]
        save_file({"a": torch.zeros(1)}, file, metadata=said.metadata())
        with pytest.raises(InputError, match=rf"tcd\.safetensors states {key} {value!r}; it must be"):
            read_accelerated("broken", file)


def test_kind_by_metadata(tmp_path: Path) -> None:
    """`pytorch_lora_weights.safetensors` is how LCM-LoRAs are handed out; its header may say more."""
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata={"modelspec.title": "LCM-LoRA SD 1.5"})
    assert read_accelerated("speed", file) == Accelerated("speed", Recommended("lcm"))
    save_file({"x": torch.zeros(1)}, file)
    assert read_accelerated("speed", file) is None
    assert read_accelerated("speed", None) is None


def test_architecture_of_a_lora_by_its_header(tmp_path: Path) -> None:
    """kohya's and diffusers' names; a LoRA that does not touch the text says nothing, and is let through."""
    assert context_width(LORA) == 128
    names = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": 2048,
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": 768,
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": 1024,
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.lora_down.weight": None,
        "lora_te_text_model_encoder_layers_0_self_attn_k_proj.lora_down.weight": None,
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": None,
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.hada_w1_a": None,
    }
    for number, (name, width) in enumerate(names.items()):
        file = tmp_path / f"{number}.safetensors"
        save_file({name: torch.zeros(4, width or 320)}, file)
        assert context_width(file) == width, name
    with pytest.raises(InputError, match=r"LoRA 'big' was made for SDXL, but the loaded checkpoint is SD 1\.x"):
        check_loras({"none": None, "fits": tmp_path / "1.safetensors", "big": tmp_path / "0.safetensors"}, 768)
    check_loras({"big": tmp_path / "0.safetensors"}, 2048)
    check_loras({"big": tmp_path / "0.safetensors"}, None)


def test_networks_without_timesteps_to_skip_are_refused() -> None:
    """The real networks of SD3 and Flux, small; and an SD network that was trained as a flow."""
    size = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1, "joint_attention_dim": 8}
    sd3 = SD3Transformer2DModel(sample_size=8, caption_projection_dim=8, pooled_projection_dim=8, **size)
    flux = FluxTransformer2DModel(**size, num_single_layers=1, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4))
    sd = torch.nn.ModuleDict({"time_embed": torch.nn.Linear(1, 1)})
    for network, prediction in ((sd3, "epsilon"), (flux, "const"), (sd, "const"), (sd, "edm")):
        with pytest.raises(InputError, match=r"my_model is no model for LCM or TCD.* SD3, Flux"):
            check_network("my_model", network, prediction)
    for prediction in ("epsilon", "v_prediction"):
        check_network("my_model", sd, prediction)


def test_width_of_a_network() -> None:
    """ldm's and diffusers' networks name that layer alike."""
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(EMOJI / "unet_lcm"))
    assert network_width(unet) == 128
    assert network_width(torch.nn.Linear(1, 1)) is None
    packed = torch.nn.Module()
    packed.register_parameter("weight", torch.nn.Parameter(torch.zeros(40, 1, dtype=torch.uint8), requires_grad=False))
    assert network_width(torch.nn.ModuleDict({"attn2": torch.nn.ModuleDict({"to_k": packed})})) is None


LCM, TCD = Accelerated("lcm", Recommended("lcm")), Accelerated("hyper", Recommended("tcd"))
PHASED = Accelerated("phased", Recommended("tcd", steps=2, gamma=0.0, original_steps=10))


@pytest.mark.parametrize(
    ("steps", "cfg", "models", "full", "wanted"),
    [
        (20, 7, [LCM, None], None, ("LCM Suite", 4, 1.0, None)),
        (6, 1.5, [None, LCM, None], None, ("LCM Suite", 6, 1.5, None)),  # already right
        (20, 7, [TCD, None], None, ("TCD Suite", 4, 1.0, None)),
        (20, 7, [PHASED, None], None, ("TCD Suite", 2, 1.0, 0.0)),  # by what its file states
        (4, 1, [PHASED, None], None, ("TCD Suite", 4, 1.0, 0.0)),
        (20, 7, [LCM], None, ("LCM Suite", 4, 1.0, None)),  # LoRA merged into the checkpoint
        (20, 7, [LCM], "LCM_Dreamshaper", ("LCM Suite", 4, 7, None)),  # guidance goes in as embedding
        (3, 20, [None], "full", ("LCM Suite", 3, 8.0, None)),
        (20, 8, [PHASED], "phased", ("TCD Suite", 2, 8, 0.0)),
        (20, 7, [None, None], None, None),
    ],
)
def test_recommendation(steps, cfg, models, full, wanted) -> None:  # type: ignore[no-untyped-def]
    got = recommend(steps, cfg, models, full, USUAL_FULL if full else USUAL_LORA)
    assert (got and (got.sampler, got.steps, got.guidance_scale, got.recommended.gamma)) == wanted
    assert (got and got.recommended.original_steps) == (10 if PHASED in models else None)


def test_the_settings_page_is_followed_and_said() -> None:
    usual = Recommended(steps=6, guidance_scale=1.8)
    got = recommend(20, 7, [Accelerated("my-lcm", Recommended("lcm"))], None, usual)
    assert got == Recommendation("LCM Suite", 6, 1.8, "my-lcm", False, Recommended("lcm"))
    assert str(got) == "my-lcm is made for few steps: LCM Suite, 6 steps, CFG 1.8"
    phased = recommend(20, 7, [PHASED], None, usual)
    assert str(phased) == "phased is made for few steps: TCD Suite, 2 steps, CFG 1.8, gamma 0, 10 original steps"


@pytest.mark.parametrize(("cfg", "wanted"), [(7, 2.0), (3, 3), (1, 1), (0.5, 2.0)])
def test_a_full_lcm_that_states_its_guidance(cfg: float, wanted: float, tmp_path: Path) -> None:
    file = tmp_path / "of_any_name.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata=Recommended("lcm", guidance_scale=2.0).metadata())
    got = recommend(4, cfg, [read_accelerated("emoji", file)], "emoji", USUAL_FULL)
    assert got is not None
    assert got.guidance_scale == wanted
