"""An SD 2.x checkpoint in the real web UI (A1111 only: Forge builds SD 2.x in its usual size alone).

Text encoder in OpenCLIP's full size, U-Net small, both with random weights: it paints noise, but the same everywhere.
"""

from __future__ import annotations

import gzip
import json
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from sampling_references import check, diffusers_timesteps
from transformers import CLIPTextConfig, CLIPTextModel
from webui_harness import EMOJI, WebUI, difference

from lcm_core.export.webui import webui_yaml
from lcm_core.files.checkpoint import Component, ModelInfo, read_component, save_single_file
from lcm_core.pipeline import Pipeline

pytestmark = pytest.mark.host
PREDICTIONS = ("epsilon", "v_prediction")
TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}


def make_checkpoints(folder: Path) -> None:
    """`sd2_epsilon` and `sd2_v_prediction`: one set of weights, two descriptions."""
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_act="gelu", **TEXT)).half()
    plain = read_component(EMOJI / "unet_teacher", "unet").config
    heads = [channels // 32 for channels in plain["block_out_channels"]]  # SD 2.x's are all of one width, which is 64
    small = {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": heads}
    unet = UNet2DConditionModel.from_config({**plain, **small}).half()
    components = {
        "unet": Component(unet.state_dict(), {**unet.config}),
        "vae": read_component(EMOJI / "vae", "vae"),
        "text_encoder": Component(text.state_dict(), text.config.to_dict()),
    }
    first = folder / f"sd2_{PREDICTIONS[0]}.safetensors"
    for prediction in PREDICTIONS:
        info = ModelInfo(family="sd2", prediction_type=prediction)
        file = folder / f"sd2_{prediction}.safetensors"
        if file == first:
            save_single_file(file, components, info)
        else:
            file.symlink_to(first)
        file.with_suffix(".yaml").write_text(webui_yaml(components, info), "utf-8")


def write_tokenizer(folder: Path, webui: WebUI) -> Path:
    """CLIP's vocabulary as transformers reads it, from the one that the web UI's own OpenCLIP has."""
    command = [webui._python(), "-c", "import open_clip.tokenizer as t; print(t.default_bpe())"]
    source = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    merges = gzip.decompress(Path(source).read_bytes()).decode().splitlines()[1 : 49152 - 256 - 2 + 1]
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair.split()) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    return folder


@cache
def pipeline(file: Path, tokenizer: Path) -> Pipeline:
    return Pipeline.load(file, device="cpu", dtype="float32", tokenizer=tokenizer)


@pytest.mark.parametrize(("guidance_scale", "batch"), [(1.0, 1), (2.0, 2)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sd2_paints_what_the_library_paints(webui: WebUI, prediction: str, guidance_scale: float, batch: int) -> None:
    if webui.is_forge:
        pytest.skip("Forge builds SD 2.x in its usual size only")
    folder = webui.data / "models" / "Stable-diffusion"
    if not (folder / "sd2_epsilon.yaml").exists():
        make_checkpoints(folder)
        webui.call("/sdapi/v1/refresh-checkpoints", {})
    webui.load(f"sd2_{prediction}")
    painted = webui.paint(sampler_name="LCM Suite", cfg_scale=guidance_scale, negative_prompt="a face")
    check(painted, "LCM Suite", diffusers_timesteps(4), batch)
    pipe = pipeline(folder / "sd2_epsilon.safetensors", write_tokenizer(webui.data / "tokenizer", webui))
    pipe.model.diffusion = replace(pipe.model.diffusion, prediction_type=prediction)
    options = {"guidance_scale": guidance_scale, "seed": 1, "width": 64, "height": 64, "sampler": "lcm"}
    wanted = pipe("pizza, noto style", "a face", num_inference_steps=4, **options)
    assert difference(painted.pictures[0], wanted.images[0]) <= 1
