"""The nodes inside a real ComfyUI (COMFYUI_PATH): sampling, files, patches and distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lcm_core.networks.lora_layers import add_lora, lora_state_dict
from lcm_core.networks.unet import load_unet
from lcm_core.pipeline.sources import find_source
from tests.nodes.host_setup import NEEDS_HOST

pytestmark = NEEDS_HOST


def test_apply_scheduler_and_sampler_equal_the_ksampler(findings: Any) -> None:
    """In the host's own custom sampling; LCM Apply replaces earlier guidance; each picture has its own seed."""
    found = findings["sampling"]
    for name in (
        "custom lcm",
        "custom tcd",
        "applied twice lcm",
        "applied twice tcd",
        "stock ksampler, 1 step",
        "batch",
    ):
        assert found[name] <= 5e-4, (name, found[name])  # latents in the host's scale, 5.5 times the sampler's
    assert found["info"].startswith("guidance 3 applied, 50 original steps; full LCM (SD 1.x")
    assert found["plain info"].startswith("50 original steps; plain model (SD 1.x")


def test_the_grid_shows_the_ksamplers_pictures(findings: Any) -> None:
    """Row by row, with one noise for all; and the sheet has room for labels."""
    found = findings["grid"]
    assert found["images"] == [4, 64, 64, 3]
    assert found["apart"] <= 1e-4
    assert found["sheet"][1] > 2 * 64
    assert found["sheet"][2] > 2 * 64


def test_travel_ends_on_the_single_pictures(findings: Any) -> None:
    """Bit for bit; and every frame moves, by a share of the way."""
    found = findings["travel"]
    assert found["frames"] == 5
    assert found["ends"] == [0.0, 0.0]
    assert 0 < found["smallest jump"] < found["whole way"]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("channels", "16 channels but this MODEL takes 4"),
        ("video", "1x4x3x8x8, is no batch of pictures, which this MODEL takes"),
        ("strength", "strength 0.5 was given with an empty latent"),
        ("steps", "use at most 5 steps"),
        ("negative", "needs a negative prompt"),
        ("timesteps", "'999, x' is no list of numbers"),
        ("frames", "cannot make 0 frames"),
        ("lora", "is for another kind of model"),
        ("full", "is a full LCM already"),
        ("nothing", "nothing to learn from"),
        ("broken", "is a pickle"),
    ],
)
def test_bad_input_is_explained(findings: Any, case: str, said: str) -> None:
    """One line that names what was given and what to do; nothing else fails because of it."""
    assert said in findings["bad_input"][case]


def test_auto_follows_what_files_state(findings: Any) -> None:
    """Sampler, gamma and original steps, of a checkpoint, of a LoRA, of one that was saved again, and of a new student,
    which the previews show like that too; lcm where nothing is stated."""
    found = findings["stated"]
    said = "; made for tcd, 2 steps, gamma 0, 10 original steps"
    assert found["info"].endswith(said)
    assert all(info.endswith(said) for info in found["lora info"])
    assert found["auto"] == [0.0, 0.0, 0.0]
    assert min(found["lcm"], found["other grid"]) > 0.01
    assert found["nothing stated"] == 0
    assert found["student"].endswith("; made for tcd, 4 steps, gamma 0.3")
    assert found["preview"] <= 0.02 < found["preview by lcm"]


def test_a_lora_in_pefts_layout_is_applied_and_converted(findings: Any) -> None:
    """All its layers reach the model, and the converted file does the same."""
    found = findings["lora"]
    assert found["layers"] == 4
    assert found["moved"] > 0.01
    assert found["again"] == 0
    assert found["name"] == "converted.safetensors"


def test_the_distiller_resumes_and_leaves_the_model_as_it_was(findings: Any) -> None:
    """Interrupted, it keeps what was learnt; queued again it goes on; the LoRA plugs into the stock loader."""
    found = findings["distiller"]
    assert found["interrupted"] == "kept"
    assert found["steps"] == [2, 0, 1, 2, 3]  # done when interrupted; then the whole log
    assert found["unchanged"]
    assert found["name"] == "learnt.safetensors"
    unet = load_unet(find_source("emoji", "teacher").unet, "cpu", torch.float32)
    add_lora(unet, 4)
    assert found["keys"] == sorted(lora_state_dict(unet))  # the layers of an LCM-LoRA under the names that all UIs know
    assert found["layers"] == len(found["keys"]) / 3  # and the host finds them all
    assert found["moved"] > 1e-4
    assert found["stock loader"] <= 1e-5
    assert found["previews"][0] == 2
    assert found["preview"] <= 0.02  # as the LCM KSampler paints with the file, but for rounding to bytes and halves
    assert found["loss"] == [1, 320, 512, 3]
    assert "begun with another rank" in found["changed"]
    assert "begun with another learning rate and seed; set if_exists to 'continue' or 'start anew'" in found["asked"]


def test_a_full_lcm_keeps_its_guidance_through_the_hosts_own_nodes(findings: Any) -> None:
    """Loaded by the stock loader it is recognised, and guided once; saved by the stock node it is the same model."""
    found = dict(findings["guidance"])
    for info in (found.pop("stock info"), found.pop("scale")):
        assert "; full LCM (SD 1.x" in info
    assert len(found) == 7
    for name, difference in found.items():
        assert difference <= 1e-3, name  # latents in the host's scale


def test_a_saved_checkpoint_states_its_sampling(findings: Any) -> None:
    """What a file, or a LoRA, said of its sampling goes into the checkpoint that the stock node saves, beside a full
    LCM's guidance; and nothing where nothing was said."""
    found = findings["saved"]
    said = "; made for tcd, 2 steps, gamma 0, 10 original steps"
    assert all(found[name].endswith(said) for name in ("stated", "with lora", "full"))
    assert found["full"].startswith("full LCM")
    assert "made for" not in found["plain"]


def test_the_stock_nodes_know_ours_and_are_told_what_they_do_wrong(findings: Any) -> None:
    """Samplers and grid from the stock KSampler's lists paint as LCM KSampler; a v model that the stock node for LCM
    misreads is explained."""
    found = findings["stock_nodes"]
    assert found["listed lcm_suite"]
    assert found["listed tcd_suite"]
    assert max(found["lcm_suite"], found["tcd_suite"]) <= 5e-4
    wrong = found["kind"] == "V_PREDICTION"
    assert ("predicts v, but ModelSamplingDiscrete (lcm)" in found["behind the stock node"]) == wrong


def test_latents_of_any_size_paint(findings: Any) -> None:
    """Of a single number in each channel, and of one column: no layer normalises so few numbers that torch refuses."""
    assert findings["stock_nodes"]["small"] == {"smallest": "", "narrow": ""}


def test_adapters_of_any_widths_guide_as_diffusers(findings: Any) -> None:
    """The shipped T2I-Adapter, and one of other widths in the host's layout, which the stock loader cannot build, give
    the features of diffusers' T2IAdapter; one of Stable Diffusion's widths is left to the stock loader."""
    found = findings["control"]
    for name, by_the_host in {"emoji": False, "odd": False, "usual": True}.items():
        assert found[name]["by the host"] == by_the_host, name
        assert len(found[name]["apart"]) == 4
        assert max(found[name]["apart"]) <= 1e-4, name


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("cut", "its weight 'body.6.block1.bias' is none, expected 64; download"),
        ("other", "other.safetensors is no ControlNet or T2I-Adapter that this ComfyUI knows"),
        ("gone", "gone.safetensors is not in models/controlnet"),
    ],
)
def test_an_unfit_adapter_is_explained(findings: Any, case: str, said: str) -> None:
    """One line, without a network that is built in part."""
    assert said in findings["control"]["said"][case]
    assert "\n" not in findings["control"]["said"][case]


def test_nothing_of_the_host_is_replaced(findings: Any) -> None:
    """Every function, class and method is the one that the host came with: after the import, and after all trials."""
    assert findings["replaced"] == {"at the start": [], "at the end": []}


def test_the_stock_loaders_take_the_tiny_vae(findings: Any) -> None:
    """They cannot build the embedded model's own. What the stock nodes save of ours is that tiny one, too."""
    found = dict(findings["vae"])
    assert found.pop("kind") == "TAESD"
    assert len(found) == 6
    assert {name: apart for name, apart in found.items() if not apart <= 1e-4} == {}


def test_the_hosts_patches_do_what_they_do_with_the_stock_nodes(findings: Any) -> None:
    """More than 41 usual graphs (patches, merges, LoRAs, ControlNets, areas, masks, guiders): LCM KSampler and LCM
    Sampler paint what the stock lcm paints from the same noise, and each graph changes the picture; tcd in two halves
    (Split Sigmas) is what it paints at once."""
    found = findings["patches"]
    assert len(found["apart"]) >= 55  # older hosts lack some of the nodes
    assert {name: apart for name, apart in found["apart"].items() if not apart <= 1e-4} == {}
    assert {name: moved for name, moved in found["moved"].items() if name != "plain" and not moved > 1e-3} == {}
    assert found["split"] <= 1e-5


def test_tcd_applies_a_mask_once(findings: Any) -> None:
    """Without fresh noise tcd is Euler's method: half way down it is where the host's own Euler is, with hard and soft
    masks and with Differential Diffusion; at the end only the trace of noise of timestep 0 is between them."""
    found = findings["patches"]["trajectories"]
    assert {name: apart for name, (apart, _) in found.items() if not apart <= 1e-4} == {}
    assert {name: apart for name, (_, apart) in found.items() if not apart <= 0.1} == {}
