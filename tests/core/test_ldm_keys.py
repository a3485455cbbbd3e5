"""Single files by the original ldm and sgm classes: their names, shapes and outputs, recorded in tests/core/data."""

from __future__ import annotations

import functools
import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcm_core.files import architecture, ldm_convert, ldm_keys
from lcm_core.files.checkpoint import Component, detect_architecture, read_info
from lcm_core.files.safetensors import write_safetensors
from lcm_core.networks.text_encoder import Encoder, _load_encoder, _run, _states
from lcm_core.networks.unet import load_unet
from lcm_core.networks.vae import load_vae

CPU = torch.device("cpu")
FAMILIES = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


@functools.cache
def facts(name: str) -> dict[str, Any]:
    path = Path(__file__).parent / "data" / f"ldm_keys_{name}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weights and inputs that the recorded outputs come from: noise that depends on the name alone."""
    frequency = 12.9898 + zlib.crc32(name.encode()) % 9973 / 97
    wave = torch.sin((torch.arange(math.prod(shape), dtype=torch.float64) + 1) * frequency) * 43758.5453
    noise = ((wave - wave.floor()) * 2 - 1).reshape(shape) * 3**0.5  # even, with a variance of 1
    if name.endswith("weight") or "proj" in name:
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 0
        noise = noise * (1.4 / fan_in**0.5) if fan_in else 1 + 0.2 * noise
    elif "x:" not in name:
        noise = 0.1 * noise
    return noise.float()


def full_state(name: str) -> dict[str, Tensor]:
    state = {}
    for line in facts(name)["full"]:
        key, dtype, shape = line.split()
        sizes = [] if shape == "-" else [int(n) for n in shape.split(",")]
        state[key] = torch.empty(sizes, dtype=getattr(torch, dtype), device="meta")
    return state


def tiny_component(name: str, part: str) -> Component:
    state = {key: fill(key, tuple(shape)) for key, shape in facts(name)["tiny"].items()}
    tensors = ldm_convert.ldm_to_diffusers(state)[part]
    return Component(tensors, {}, name)


def assert_same(computed: Tensor, recorded: list[float]) -> None:
    """Equal up to rounding, relative to the largest value."""
    expected = torch.tensor(recorded)
    torch.testing.assert_close(computed.flatten(), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def build(part: str, config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        if part in ("unet", "vae"):
            return {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part].from_config(config)
        projected = config["architectures"] == ["CLIPTextModelWithProjection"]
        return (CLIPTextModelWithProjection if projected else CLIPTextModel)(CLIPTextConfig(**config))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_original_key_is_consumed_and_every_network_is_filled(name: str) -> None:
    """A wrong key map would leave a weight of the original out, or a weight of diffusers' network empty."""
    state = full_state(name)
    assert ldm_convert.unknown_keys(state) == []
    assert detect_architecture(state) == FAMILIES[name]
    components = ldm_convert.ldm_to_diffusers(state)
    assert set(components) == {"unet", "vae", "text_encoder"} | ({"text_encoder_2"} if name == "sdxl" else set())
    networks = (ldm_keys.UNET_PREFIX, ldm_keys.VAE_PREFIX, "cond_stage_model.", "conditioner.")
    assert ldm_convert.diffusers_to_ldm(components, FAMILIES[name]).keys() == {
        k for k in state if k.startswith(networks)
    }


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_inferred_configuration_has_the_original_s_weights(name: str, part: str) -> None:
    """A wrong configuration would ask for other weights or other shapes than the published files have."""
    state = full_state(name)
    components = ldm_convert.ldm_to_diffusers(state)
    if part == "text_encoder_2" and part not in components and FAMILIES[name] != "sdxl":
        pytest.skip("only SDXL has a second text encoder")
    if part == "unet":
        config = architecture.unet_config(components[part])
    elif part == "vae":
        config = architecture.vae_config(components[part], FAMILIES[name])
    else:
        config = architecture.text_config(
            components[part], ldm_convert.is_openclip(state, part), part == "text_encoder_2"
        )
    expected = {k.removeprefix("text_model."): v for k, v in shapes(build(part, config).state_dict()).items()}
    given = {k.removeprefix("text_model."): v for k, v in shapes(components[part]).items()}
    extra = given.keys() - expected.keys()
    assert expected == {k: v for k, v in given.items() if k not in extra}
    # SD 2.x does not use OpenCLIP's last layer nor its projection; the others are no weights of the encoder
    unused = ("encoder.layers.23.", "text_projection.", "logit_scale", "embeddings.position_ids")
    assert all(key.startswith(unused) for key in extra) if part.startswith("text") else not extra


def test_inferred_configurations_are_the_published_ones() -> None:
    """Heads, scaling factors and activations leave no trace in shapes: these are the published models' values."""
    sd1, sd2, sdxl = (ldm_convert.ldm_to_diffusers(full_state(name)) for name in FAMILIES)
    assert architecture.unet_config(sd1["unet"])["attention_head_dim"] == 8
    assert architecture.unet_config(sd2["unet"])["attention_head_dim"] == [5, 10, 20, 20]
    config = architecture.unet_config(sdxl["unet"])
    assert config["attention_head_dim"] == [5, 10, 20]
    assert config["transformer_layers_per_block"][1:] == [2, 10]
    assert config["projection_class_embeddings_input_dim"] == 2816
    assert architecture.vae_config(sd2["vae"], "sd2")["scaling_factor"] == 0.18215
    assert architecture.vae_config(sdxl["vae"], "sdxl")["scaling_factor"] == 0.13025
    assert architecture.text_config(sd1["text_encoder"], openclip=False)["hidden_act"] == "quick_gelu"
    text = architecture.text_config(sd2["text_encoder"], openclip=True)
    assert (text["hidden_act"], text["num_hidden_layers"], text["num_attention_heads"]) == ("gelu", 23, 16)
    text = architecture.text_config(sdxl["text_encoder_2"], openclip=True, projected=True)
    assert (text["num_hidden_layers"], text["num_attention_heads"], text["projection_dim"]) == (32, 20, 1280)


def test_clip_names_without_text_model_are_read_too() -> None:
    """Some writers leave `text_model.` out of SD 1.x text encoders; their weights must not be lost."""
    prefix = "cond_stage_model.transformer."
    state = {key.replace(prefix + "text_model.", prefix): value for key, value in full_state("sd15").items()}
    assert prefix + "final_layer_norm.weight" in state
    named = ldm_convert.ldm_to_diffusers(full_state("sd15"))["text_encoder"]
    assert ldm_convert.ldm_to_diffusers(state)["text_encoder"].keys() == named.keys()


def test_the_other_prefix_of_sd2_is_read_too() -> None:
    """The newer original code keeps SD 2.x's text encoder under `conditioner.embedders.0.`."""
    state = full_state("sd21")
    newer = {k.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): v for k, v in state.items()}
    assert (
        ldm_convert.ldm_to_diffusers(newer)["text_encoder"].keys()
        == ldm_convert.ldm_to_diffusers(state)["text_encoder"].keys()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_unet_computes_what_the_original_does(name: str) -> None:
    """Weights of equal shape swapped, wrong heads or another order of the sizes would change the output."""
    data, component = facts(name), tiny_component(name, "unet")
    component.config = {**architecture.unet_config(component.tensors), **data["config"]}
    added = None
    if name == "sdxl":
        time_ids = torch.tensor(data["outputs"]["time_ids"])
        added = {"text_embeds": fill("x:pooled", (2, 16)), "time_ids": time_ids}
    model = load_unet(component, "cpu", "float32")
    x, t, text = fill("x:latents", (2, 4, 8, 8)), torch.tensor([7.0, 801.0]), fill("x:context", (2, 7, 24))
    with torch.no_grad():
        output = model(x, t, text, added_cond_kwargs=added).sample
    assert_same(output, data["outputs"]["unet"])


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_vae_computes_what_the_original_does(name: str) -> None:
    """The decoder counts its levels the other way round, and attention changes its shape: either wrong shows here."""
    data, component = facts(name)["outputs"], tiny_component(name, "vae")
    component.config = {**architecture.vae_config(component.tensors), "scaling_factor": 1.0}
    vae = load_vae(component, "cpu", "float32")
    encoded = vae.encode(fill("x:image", (1, 3, 32, 32)))
    assert_same(encoded, data["vae_encode"])
    decoded = vae.decode(fill("x:vae_latents", (1, 4, 4, 4)))
    assert_same(decoded.flatten()[::13], [min(max(value, -1), 1) for value in data["vae_decode"]])


class _Rows:
    """Stands where a tokenizer goes: hands out the recorded token rows."""

    def __init__(self, starts: list[list[int]]) -> None:
        self.rows = [start + [0] * (77 - len(start)) for start in starts]

    def __call__(self, prompt: str) -> list[int]:
        return self.rows[int(prompt)]


@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_openclip_text_encoder_computes_what_the_original_does(name: str) -> None:
    """A wrong split of the joint projection, a projection not transposed or another layer's output would show here."""

    data, projected = facts(name), name == "sdxl"
    component = tiny_component(name, "text_encoder_2" if projected else "text_encoder")
    component.config = architecture.text_config(component.tensors, openclip=True, projected=projected)
    if not projected:
        component.config["num_hidden_layers"] -= 1  # what the rule for the full-size encoder does
    encoder = Encoder(_load_encoder(component, CPU, torch.float32), _Rows(data["token_ids"]))  # type: ignore[arg-type]
    if projected:
        outputs = [_run(encoder, encoder.tokenizer(prompt)) for prompt in "01"]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs])
        pooled = torch.cat([output.text_embeds for output in outputs])
        assert_same(pooled, data["outputs"]["text_pooled"])
    else:
        hidden = torch.cat(
            [_states(encoder, _run(encoder, encoder.tokenizer(prompt)), 0, is_sdxl=False)[0] for prompt in "01"]
        )
    assert_same(hidden.flatten()[::11], data["outputs"]["text_hidden"])


def test_a_file_with_the_original_s_names_loads_from_disk(tmp_path: Path) -> None:
    """The file reader must find the network behind its prefix, past training state that it does not want."""
    state = {key: fill(key, tuple(shape)) for key, shape in facts("sd15")["tiny"].items()}
    state |= {"betas": torch.zeros(4), "model_ema.decay": torch.tensor(0.0), "alphas_cumprod": torch.zeros(4)}
    write_safetensors(tmp_path / "original.safetensors", state)
    assert read_info(tmp_path / "original.safetensors").family == "sd1"
    unet = load_unet(tmp_path / "original.safetensors", "cpu", "float32")
    torch.testing.assert_close(
        unet.conv_in.weight, fill("model.diffusion_model.input_blocks.0.0.weight", (32, 4, 3, 3))
    )
