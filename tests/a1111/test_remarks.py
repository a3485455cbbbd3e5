"""What is said below a picture: one line for each thing that is wrong, none where all is right."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from extension_a1111.architecture import check_loras
from extension_a1111.loras import Accelerated
from extension_a1111.recommendation import USUAL_FULL, USUAL_LORA, Recommendation, Request, recommend, remarks
from extension_a1111.schedules import fit_remarks, fit_steps, fit_strength, get_sigmas_host
from lcm_core.diffusion.grids import get_timesteps_lcm
from lcm_core.diffusion.process import VariancePreserving
from lcm_core.errors import InputError
from lcm_core.files.recommended import Recommended

PROCESS = VariancePreserving()
RIGHT = Request("dream", "LCM Suite", 4, 1.0)


def advised(request: Request, lora: bool = True) -> Recommendation | None:
    model = Accelerated("lcm-lora", Recommended("lcm")) if lora else None
    full = request.checkpoint if request.is_full_lcm else None
    usual = USUAL_FULL if full else USUAL_LORA
    return recommend(request.steps, request.guidance_scale, [model], full, usual)


@pytest.mark.parametrize("sampler", ["LCM Suite", "TCD Suite", "LCM", "Euler a"])
def test_usual_settings_on_an_lcm_lora_are_advised_whatever_the_sampler(sampler: str) -> None:
    request = replace(RIGHT, sampler=sampler, steps=20, guidance_scale=7.0)
    assert remarks(request, advised(request)) == [
        "lcm-lora is made for few steps: LCM Suite, 4 steps, CFG 1 would suit it; "
        "the button in the accordion sets them."
    ]


def test_nothing_is_said_where_all_is_right() -> None:
    assert remarks(RIGHT, advised(RIGHT)) == []
    plain = replace(RIGHT, sampler="Euler a", steps=20, guidance_scale=7.0, has_negative=True)
    assert remarks(plain, advised(plain, lora=False)) == []
    full = replace(RIGHT, is_full_lcm=True, guidance_scale=8.0, refiner="other", refiner_is_full_lcm=True)
    assert remarks(full, advised(full, lora=False)) == []


def test_a_plain_checkpoint_without_a_lora_is_said() -> None:
    assert "dream is no LCM and no LCM-LoRA is in the prompt" in remarks(RIGHT, advised(RIGHT, lora=False))[0]


def test_a_negative_prompt_that_a_full_lcm_does_not_read_is_said() -> None:
    full = replace(RIGHT, is_full_lcm=True, guidance_scale=8.0, has_negative=True)
    assert remarks(full, advised(full, lora=False)) == [
        "dream is a full LCM, which reads no negative prompt; the button in the accordion clears it."
    ]
    assert remarks(replace(full, sampler="Euler a"), advised(full, lora=False)) == []


@pytest.mark.parametrize("full_first", [True, False])
def test_a_refiner_of_the_other_kind_is_said(full_first: bool) -> None:
    request = replace(
        RIGHT, is_full_lcm=full_first, guidance_scale=1.0 if not full_first else 8.0, refiner="second",
        refiner_is_full_lcm=not full_first,
    )  # fmt: skip
    full, plain = ("dream", "second") if full_first else ("second", "dream")
    assert f"{full} is a full LCM and {plain} is none" in remarks(request, advised(request))[0]


def test_a_request_is_read_with_its_negative_prompt_and_refiner(fake_host: Any, tmp_path: Path) -> None:
    """Through `advice`, as the page calls it: plain model, refiner with guidance embedding."""
    cond_proj = {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(4, 2)}
    save_file({"model.diffusion_model.x.attn2.to_k.weight": torch.zeros(4, 768)}, tmp_path / "dream.safetensors")
    save_file(cond_proj, tmp_path / "full.safetensors")
    known = {name: SimpleNamespace(filename=str(tmp_path / f"{name}.safetensors")) for name in ("dream", "full")}
    fake_host.sd_models.get_closet_checkpoint_match = known.get
    fake_host.sd_models.select_checkpoint = lambda: known["dream"]
    fake_host.shared.prompt_styles = SimpleNamespace(apply_styles_to_prompt=lambda text, styles: text)
    said: list[str] = []
    p = SimpleNamespace(
        prompt="a cat",
        negative_prompt="",
        styles=[],
        steps=4,
        cfg_scale=8.0,
        sampler_name="LCM Suite",
        refiner_checkpoint="full",
        refiner_switch_at=0.8,
        comment=said.append,
    )
    fake_host.load("extension_a1111.advice").apply(p, [False], {})
    assert len(said) == 2
    assert said[0].startswith("LCM Suite: dream is no LCM")
    assert said[1].startswith("LCM Suite: full is a full LCM and dream is none")


@pytest.fixture
def page(fake_host: Any, tmp_path: Path) -> Iterator[Any]:
    """`advice` in a host with the checkpoints dream and full, the first of them chosen, and one LCM-LoRA for each."""
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    cond_proj = {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(4, 2)}
    lora = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_down.weight"
    save_file({key: torch.zeros(4, 768)}, tmp_path / "dream.safetensors")
    save_file({key: torch.zeros(4, 768), **cond_proj}, tmp_path / "full.safetensors")
    save_file({lora: torch.zeros(4, 2048)}, tmp_path / "lcm_xl.safetensors")
    save_file({lora: torch.zeros(4, 768)}, tmp_path / "lcm_sd15.safetensors")
    files = {file.stem: SimpleNamespace(filename=str(file)) for file in sorted(tmp_path.iterdir())}
    fake_host.sd_models.get_closet_checkpoint_match = files.get
    fake_host.sd_models.select_checkpoint = lambda: files[fake_host.chosen]
    fake_host.sd_samplers.all_samplers = [SimpleNamespace(name="DPM++ 2M")]
    fake_host.shared.prompt_styles = SimpleNamespace(apply_styles_to_prompt=lambda text, styles: text)
    fake_host.chosen = "dream"
    networks: Any = ModuleType("networks")
    networks.available_networks = {name: file for name, file in files.items() if name.startswith("lcm")}
    sys.modules["networks"] = networks
    yield SimpleNamespace(advice=fake_host.load("extension_a1111.advice"), host=fake_host, networks=networks)
    del sys.modules["networks"]


def test_the_button_adds_a_lora_that_fits_a_plain_checkpoint(page: Any) -> None:
    answer = page.advice.put_right("a cat", "fog", "LCM Suite", 4, 1.0, 0.3, 50)
    assert answer[:7] == ("a cat <lora:lcm_sd15:1>", "fog", "LCM Suite", 4, 1.0, 0.3, 50)
    assert answer[7].startswith("lcm_sd15 is made for few steps")


def test_the_button_sets_the_hosts_sampler_where_no_lora_fits(page: Any) -> None:
    del page.networks.available_networks["lcm_sd15"]
    answer = page.advice.put_right("a cat", "fog", "TCD Suite", 4, 1.0, 0.3, 50)
    assert answer[:5] == ("a cat", "fog", "DPM++ 2M", 20, 7.0)
    assert "no LCM-LoRA for it was found" in answer[7]
    nothing = page.advice.put_right("a cat", "fog", "Euler a", 25, 6.0, 0.3, 50)
    assert nothing[:5] == ("a cat", "fog", "Euler a", 25, 6.0)


def test_a_flow_model_is_left_as_it_is(page: Any, tmp_path: Path) -> None:
    """Schnell, turbo and lightning models are for few steps, and their files do not say so."""
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}, tmp_path / "flux.safetensors")
    page.host.sd_models.select_checkpoint = lambda: SimpleNamespace(filename=str(tmp_path / "flux.safetensors"))
    answer = page.advice.put_right("a cat", "fog", "LCM Suite", 4, 1.0, 0.3, 50)
    assert answer[:7] == ("a cat", "fog", "LCM Suite", 4, 1.0, 0.3, 50)
    said: list[str] = []
    page.advice.apply(request_for(said), [False], {})
    assert said == []


def request_for(said: list[str]) -> Any:
    """The web UI's request for a picture; what is remarked on goes into `said`."""
    settings = {"prompt": "a cat", "negative_prompt": "", "styles": [], "steps": 4, "cfg_scale": 1.0}
    return SimpleNamespace(**settings, sampler_name="LCM Suite", comment=said.append)


def test_below_the_picture_and_beside_the_button_the_language_of_the_page_is_spoken(page: Any) -> None:
    page.host.shared.opts.localization = "ko_KR"
    said: list[str] = []
    page.advice.apply(request_for(said), [False], {})
    said.append(page.advice.put_right("a cat", "", "LCM Suite", 4, 1.0, 0.3, 50)[7])
    assert len(said) == 2
    assert all(re.search("[가-힣]", line) for line in said)


def test_the_button_clears_what_a_full_lcm_does_not_read(page: Any) -> None:
    page.host.chosen = "full"
    answer = page.advice.put_right("a cat", "fog", "LCM Suite", 4, 8.0, 0.3, 50)
    assert answer[:5] == ("a cat", "", "LCM Suite", 4, 8.0)


def test_the_button_takes_out_a_refiner_of_the_other_kind(page: Any) -> None:
    assert page.advice.fit_refiner("None", "LCM Suite", "full") == "None"
    assert page.advice.fit_refiner("None", "LCM Suite", "dream") == "dream"
    assert page.advice.fit_refiner("None", "Euler", "full") == "full"
    assert page.advice.fit_refiner("", "LCM Suite", "") == ""


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "lora_unet_single_blocks_3_linear1.lora_down.weight",
        "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight",
        "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight",
    ],
)
def test_a_lora_for_a_transformer_is_refused_in_one_line(key: str, tmp_path: Path) -> None:
    file = tmp_path / "flux-turbo.safetensors"
    save_file({key: torch.zeros(4, 3072)}, file)
    with pytest.raises(InputError, match=r"LoRA 'flux-turbo' was made for a transformer such as Flux .* is SD 1\.x"):
        check_loras({"flux-turbo": file}, 768)
    check_loras({"flux-turbo": file}, None)  # nothing is known of the network


def test_a_unets_own_transformer_blocks_are_no_transformer(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora"
    save_file({f"unet.{stem}_A.weight": torch.zeros(4, 320), "lora_te_x.lora_down.weight": torch.zeros(4, 8)}, file)
    check_loras({"style": file}, 768)


@pytest.mark.parametrize(
    ("steps", "strength", "wanted"),
    [(20, 0.3, 15), (4, 0.01, 1), (60, 1.0, 50), (4, 0.3, 4), (50, 1.0, 50), (8, 0.999, 8)],
)
def test_steps_are_fitted_to_the_grid(steps: int, strength: float, wanted: int) -> None:
    """As many as it has; those that it has not are a comment, and never an error between two passes."""
    fitted = fit_strength(50, strength)
    count = fit_steps(steps, 50, fitted)
    assert count == wanted
    assert len(get_timesteps_lcm(count, 50, fitted)) == count
    said = fit_remarks(steps, count, strength, fitted)
    assert len(said) == (count < steps) + (fitted > strength)
    if (steps, strength) == (20, 0.3):
        assert said == ["20 steps are more than the grid has at strength 0.3; 15 were taken."]


def test_every_grid_has_a_step_left_at_hardly_any_strength() -> None:
    """49 * (1 / 49) is below 1 in floating point."""
    for original_steps in range(1, 1001):
        assert len(get_timesteps_lcm(1, original_steps, fit_strength(original_steps, 1e-4))) == 1


@pytest.mark.parametrize("host_steps", [1, 4, 50, 66, 400, 2000])
def test_the_schedule_gives_as_many_levels_as_a_host_asks_for(host_steps: int) -> None:
    """20 steps at denoising 0.3 make a host ask for 66; an error would end hires fix after its first pass."""
    sigmas = get_sigmas_host(PROCESS, host_steps)
    assert len(sigmas) == host_steps + 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() <= 0).all()
    if host_steps <= 50:
        timesteps = PROCESS.sigma_to_t(sigmas[:-1]).tolist()
        assert timesteps == get_timesteps_lcm(host_steps).tolist()
