"""reForge and Forge Classic, which know SD 1.5 by its usual widths only: such a network of few layers, random weights.

Its pictures mean nothing, but must be the same everywhere. It takes 1 GB of disk, which REFORGE_MODELS may name a
folder for to keep it between runs.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from round_trips import comes_back, paint_twice
from sampling_references import check, diffusers_timesteps
from webui_harness import ROOT, WebUI, difference, to_base64
from webui_page import ask_for_plan, browser_page, generate, open_tab, set_up, shoot, value_of, wait_for_active
from webui_tab import distil

from lcm_core.files.checkpoint import Component, ModelInfo, save_single_file
from lcm_core.files.lora import save_lora
from lcm_core.pipeline import Pipeline

pytestmark = pytest.mark.host
PROMPT = "a lighthouse"
MODELS = (("random", ""), ("random", "<lora:lcm_few:0.8>"), ("random_full", ""))
"""Plain, LoRA, full LCM: a checkpoint, and what the prompt ends with."""
TRIPS = 9  # the network is large: these take minutes
PROCESSES = """
import json, sys
sys.argv = sys.argv[:1] + ["--always-cpu"]
from modules import paths
from ldm_patched.modules import args_parser
args_parser.args = args_parser.parser.parse_known_args()[0]
from ldm_patched.modules.model_base import ModelType, model_sampling
from ldm_patched.modules.supported_models import SD15
sys.path.append({root!r})
from extension_a1111.architecture import prediction_of
kinds = [kind for kind in ModelType if kind.name in ("EPS", "V_PREDICTION", "V_PREDICTION_EDM", "FLOW")]  # if known
made = {{kind.name: model_sampling(SD15({{}}), kind) for kind in kinds}}
print()
print(json.dumps({{name: [prediction_of(found), len(found.sigmas)] for name, found in made.items()}}))
"""
_LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def make_checkpoints(folder: Path) -> None:
    """`random` and `random_full`, which has a guidance embedding as well and shares the other weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    sizes: dict[str, Any] = {
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": (320, 320, 320, 320),  # the first must be 320
        "layers_per_block": 1,
    }
    unet = UNet2DConditionModel(**sizes, cross_attention_dim=768, attention_head_dim=8).half()
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2).half()
    text_sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **text_sizes)).half()
    components = {
        "unet": Component(unet.state_dict(), dict(unet.config)),
        "vae": Component(vae.state_dict(), dict(vae.config)),
        "text_encoder": Component(text.state_dict(), text.config.to_dict()),
    }
    info = ModelInfo(family="sd1")
    save_single_file(folder / "random.safetensors", components, info)
    weights = {**components["unet"].tensors, "time_embedding.cond_proj.weight": torch.randn(320, 256).half() / 16}
    config = {name: value for name, value in unet.config.items() if name != "_use_default_values"}
    components["unet"] = Component(weights, config | {"time_cond_proj_dim": 256})
    save_single_file(folder / "random_full.safetensors", components, info)


def make_lora(file: Path) -> None:
    """One layer of it, strong enough to be seen."""
    torch.manual_seed(1)
    down, up = torch.randn(4, 768), torch.randn(320, 4)
    save_lora(
        file,
        {f"{_LAYER}.lora_down.weight": down, f"{_LAYER}.lora_up.weight": up, f"{_LAYER}.alpha": torch.tensor(4.0)},
        "sd1",
    )


def put_models(models: Path, kept: Path) -> None:
    """Into a web UI's folder, from one where they are made if they are not there yet."""
    if not (kept / "random_full.safetensors").exists():
        make_checkpoints(kept)
    checkpoints = models / "Stable-diffusion"
    checkpoints.mkdir(parents=True)
    for name in ("random", "random_full"):
        (checkpoints / f"{name}.safetensors").symlink_to(kept / f"{name}.safetensors")
    (models / "Lora").mkdir()
    make_lora(models / "Lora" / "lcm_few.safetensors")


@pytest.fixture(scope="module", params=["REFORGE", "CLASSIC"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WebUI:
    """A web UI that does not run."""
    path = os.environ.get(f"{request.param}_PATH")
    if not path:
        pytest.skip(f"{request.param}_PATH is not set to a checkout of the web UI")
    return WebUI(request.param, Path(path), tmp_path_factory.mktemp("reforge"))


@pytest.fixture(scope="module")
def reforge(installed: WebUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """It, running, with the models of this file."""
    put_models(installed.data / "models", Path(os.environ.get("REFORGE_MODELS") or tmp_path_factory.mktemp("models")))
    try:
        installed.start()
        yield installed
    finally:
        installed.close()


@lru_cache(maxsize=1)  # gigabytes each
def pipeline(file: Path, tokenizer: Path, lora: Path | None = None) -> Pipeline:
    loras = [] if lora is None else [(lora, 1.0)]
    return Pipeline.load(file, device="cpu", dtype="float32", tokenizer=tokenizer, lora=loras)


def reference(reforge: WebUI, name: str = "random", lora: str = "", **settings: Any) -> Image.Image:
    models = reforge.data / "models"
    file = models / "Lora" / f"{lora}.safetensors" if lora else None
    words = reforge.checkout / "ldm_patched" / "modules" / "sd1_tokenizer"
    pipe = pipeline(models / "Stable-diffusion" / f"{name}.safetensors", words, file)
    given: dict[str, Any] = {"num_inference_steps": 4, "seed": 1, "width": 64, "height": 64, "sampler": "lcm"}
    return pipe(settings.pop("prompt", PROMPT), settings.pop("negative_prompt", ""), **given | settings).images[0]


def test_everything_is_loaded_and_listed(reforge: WebUI) -> None:
    assert "could not be loaded" not in reforge.read_log()
    names = [sampler["name"] for sampler in reforge.call("/sdapi/v1/samplers")]
    assert names.count("LCM Suite") == names.count("TCD Suite") == 1
    scripts = reforge.call("/sdapi/v1/scripts")
    assert "lcm suite" in scripts["txt2img"]
    assert "lcm latent travel" in scripts["img2img"]
    parts = [str(part["props"].get("elem_id")) for part in reforge.call("/config")["components"]]
    assert "lcm_distil_start" in parts


def test_its_own_noise_processes_are_understood(installed: WebUI) -> None:
    command = [installed._python(), "-c", PROCESSES.format(root=str(ROOT))]
    result = subprocess.run(command, cwd=installed.checkout, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["EPS"] == ["epsilon", 1000]
    assert found["V_PREDICTION"] == ["v_prediction", 1000]
    assert found["V_PREDICTION_EDM"][0] not in ("epsilon", "v_prediction")
    assert found.get("FLOW", ["no such kind"])[0] not in ("epsilon", "v_prediction")


@pytest.mark.parametrize(("sampler", "guidance_scale", "batch"), [("LCM Suite", 1.0, 1), ("TCD Suite", 2.0, 2)])
def test_samplers_paint_the_librarys_picture(reforge: WebUI, sampler: str, guidance_scale: float, batch: int) -> None:
    reforge.load("random")
    # Classic runs the first step without guidance where its option says 0
    own = {"override_settings": {"skip_early_cond": -1}} if reforge.kind == "CLASSIC" else {}
    given = {"prompt": PROMPT, "negative_prompt": "fog", "sampler_name": sampler, "cfg_scale": guidance_scale}
    painted = reforge.paint(**given, **own)
    check(painted, sampler, diffusers_timesteps(4), batch)
    settings = {"guidance_scale": guidance_scale, "sampler": sampler[:3].lower(), "negative_prompt": "fog"}
    assert difference(painted.pictures[0], reference(reforge, **settings)) <= 1
    assert np.asarray(painted.pictures[0]).std() > 2  # not blank


def test_batch_travel_image_to_image_and_hires(reforge: WebUI) -> None:
    """On their grids, and the batch and the travel with the pictures of their own seeds."""
    reforge.load("random")
    usual = {"prompt": PROMPT, "sampler_name": "LCM Suite"}
    both = reforge.paint(**usual, batch_size=2).pictures[-2:]
    second = reference(reforge, guidance_scale=1.0, seed=2)
    assert difference(both[1], second) <= 1
    args = ["@ 2", True, False, False, 2, 6, "linear", "slerp", []]
    frames = reforge.paint(**usual, script_name="lcm latent travel", script_args=args).pictures
    assert difference(frames[-1], second) <= 1
    picture = {"init_images": [to_base64(Image.new("RGB", (64, 64), "orange"))], "denoising_strength": 0.5}
    assert reforge.paint("img2img", **usual, **picture, steps=2).timesteps == [499, 259]
    hires = {"enable_hr": True, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 2}
    painted = reforge.paint(**usual, **hires, denoising_strength=0.5, steps=1, hr_cfg=1)
    assert painted.timesteps == [999, 499, 259]
    assert painted.pictures[0].size == (128, 128)


def test_a_lora_is_recognised_and_painted_with(reforge: WebUI) -> None:
    reforge.load("random")
    auto = {"LCM Suite": {"args": [True]}}
    prompt = f"{PROMPT}<lora:lcm_few:1>"
    painted = reforge.paint(prompt=prompt, sampler_name="Euler", steps=20, cfg_scale=7, alwayson_scripts=auto)
    assert painted.sampler == "LCM Suite"
    assert painted.batches == [1] * 4
    wanted = reference(reforge, lora="lcm_few", guidance_scale=1.0)
    assert difference(painted.pictures[0], wanted) <= 1
    assert difference(wanted, reference(reforge, guidance_scale=1.0)) > 1


def test_a_full_lcm_takes_the_cfg_slider_as_embedding(reforge: WebUI) -> None:
    reforge.load("random_full")
    painted = reforge.paint(prompt=PROMPT, negative_prompt="fog", sampler_name="LCM Suite", cfg_scale=5)
    assert painted.batches == [1] * 4
    assert "reads no negative prompt" in painted.said
    assert difference(painted.pictures[0], reference(reforge, "random_full", guidance_scale=5.0)) <= 1


def test_in_the_browser(reforge: WebUI) -> None:
    """Generate, and the tab with its plan; the controls that the sampler reads alone are shown."""
    reforge.load("random")
    reforge.call("/sdapi/v1/options", {"lcm_suite_distil_python": sys.executable})
    with browser_page(reforge) as page:
        set_up(page, PROMPT, "LCM Suite", steps=2, width=64, height=64, cfg_scale=1, seed=1)
        picture = Image.open(io.BytesIO(generate(page)[0]))
        assert "Sampler: LCM Suite" in picture.info["parameters"]
        wanted = reference(reforge, guidance_scale=1.0, num_inference_steps=2)
        assert difference(picture.convert("RGB"), wanted) <= 1
        page.locator("[id$=txt2img_lcm_suite_lcm_suite] .label-wrap").first.click()
        page.wait_for_selector("[id$=txt2img_lcm_suite_lcm_suite_original_steps]:visible")
        assert not page.locator("[id$=txt2img_lcm_suite_lcm_suite_gamma]").is_visible()
        assert value_of(page, "#txt2img_sampling") == "LCM Suite"
        open_tab(page)
        wait_for_active(page, "start")
        planned = ask_for_plan(page)
        assert "Preset: emoji" in planned
        assert "Memory at the peak" in planned
        shoot(page, reforge, "distil-plan")


def test_the_tab_distils_from_start_to_end(reforge: WebUI, tmp_path: Path) -> None:
    with browser_page(reforge) as page:
        distil(reforge, page, tmp_path)


@pytest.mark.parametrize(("checkpoint", "lora"), MODELS, ids=["plain", "lora", "full"])
def test_a_picture_comes_back(reforge: WebUI, checkpoint: str, lora: str) -> None:
    """See `round_trips.py`."""
    if reforge.kind == "CLASSIC":
        pytest.skip("Forge Classic writes its own setting NGMS into an infotext and does not take it back from there")
    reforge.load(checkpoint)
    for number in range(MODELS.index((checkpoint, lora)), TRIPS, len(MODELS)):
        first, again = paint_twice(reforge, number, lora)
        assert comes_back(first, again), (number, first.infotext, again.infotext)
