"""Flow models inside a real ComfyUI (COMFYUI_PATH): tiny ones of its own classes, and the embedded one as a flow."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.nodes.host_setup import NEEDS_HOST

pytestmark = NEEDS_HOST
FAMILIES = ("SD3", "Flux", "Z-Image", "Qwen-Image", "Wan")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_model_is_fed_the_right_mixture(findings: Any, family: str) -> None:
    """A tiny model of the host's own class whose x0 is known, lcm and tcd: mean (1 - s) x0 and spread s in each of 1,
    2, 4, 8 steps, from noise, from a picture at four strengths, and around a mask; and x0 comes out."""
    found = findings["families"][family]["fed"]
    assert len(found) == 2 * (4 + 4 + 1)
    for name, case in found.items():
        assert case["calls"] == case["steps"]
        assert case["first"] == pytest.approx(case["expected first"], abs=1e-5), name
        assert case["mean"] <= 0.02, name  # of 32,768 numbers and more
        assert case["spread"] <= 0.02, name
        assert case["x0"] <= 1e-3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_takes_a_flow_model(findings: Any, family: str) -> None:
    """LCM Sampler gives what the stock lcm gives from the same noise; LCM Apply, Scheduler and Sampler, and our names
    in the stock lists, what LCM KSampler gives; LCM Travel ends on its pictures, and LCM Steps Grid shows them."""
    found = findings["families"][family]
    assert found["stock lcm"] <= 1e-5  # of the largest number in the latents
    assert found["custom lcm"] <= 1e-5
    assert found["custom tcd"] <= 1e-5
    assert found["stock ksampler"] <= 1e-5
    assert found["travel"] == [0.0, 0.0]
    assert found["grid"] == [2, 8, 8, 3]
    assert found["between"] == found["shape"]
    assert f"plain model ({found['config']}, flow with shift {found['shift']:.4g})" in found["info"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_model_is_distilled(findings: Any, family: str) -> None:
    """20 steps of lcd: their memory is told before the first; the loss falls; an interrupted run that went on learnt
    the same; the stock loader finds a place for every key, and the picture changes; LCM LoRA Convert applies it alike
    and saves it under the same names; the MODEL stays as it was."""
    found = findings["distil_families"][family]
    assert re.fullmatch(r"about \d\.\d\d GB of memory at the peak: .* frozen .* LoRA .* activations", found["told"])
    assert found["finite"]
    assert found["falls"] < 1
    assert found["half"] == 10
    assert found["resumed"] == 0
    assert found["left over"] == []
    assert found["named"]
    assert found["layers"] == found["keys"] / 3
    assert found["moved"] > 0.01
    assert found["same"] == 0
    assert found["converted"] == 0
    assert found["saved"]
    assert found["unchanged"]


def test_a_flow_lora_in_diffusers_names_is_put_where_the_stock_loader_puts_it(findings: Any) -> None:
    """LCM LoRA Convert finds the three layers of Flux that are one in the host."""
    found = findings["distil_families"]["in diffusers names"]
    assert found["moved"] > 0.01
    assert found["apart"] == 0


@pytest.mark.parametrize("method", ["tcd", "segmented", "dmd2", "finetune"])
def test_a_flow_model_is_distilled_by_every_method(findings: Any, method: str) -> None:
    """Each trains the LoRA with finite losses."""
    found = findings["distil_families"]["methods"][method]
    assert len(found["losses"]) == 3
    assert all(0 < loss < 100 for loss in found["losses"])
    assert found["moved"] > 0


@pytest.mark.parametrize("kind", ["EDM", "Cascade", "V_PREDICTION"])
def test_a_process_that_is_not_known_is_refused_by_all_nodes_alike(findings: Any, kind: str) -> None:
    """EDM, Stable Cascade's and the sound models' continuous v: the same words everywhere, with what it is."""
    said = findings["families"]["refused"][kind]
    assert len(said) == 7
    assert len(set(said.values())) == 1
    [words] = set(said.values())
    assert kind in words
    assert "adds noise in a way that LCM does not know; use the sampler made for it" in words


def test_a_trained_flow_paints_as_the_model_that_it_was_made_of(findings: Any) -> None:
    """The embedded teacher's file with the mark of a flow model, from the stock loader: the same pictures by lcm and by
    euler, with guidance; a LoRA that is distilled of it works in the stock loader and the stock KSampler; saved by the
    host it is the flow model again."""
    found = findings["flow_teacher"]
    assert "flow with shift 1" in found["info"]
    assert max(found["lcm"], found["euler"]) <= 1e-3  # of pictures in [0, 1]
    assert found["left over"] == []
    assert found["moved"] > 0.01
    assert all(0 < loss < 10 for loss in found["losses"])
    assert found["saved"] <= 1e-3
