"""The embedded model in ComfyUI's own nodes, beside lcm_core's pipeline: same weights, noise and timesteps."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from comfyui import Server, export_into, make_base
from graph import CONTROL, SIZE, Graph, Link, Prompt
from PIL import Image

from lcm_core.pipeline import Pipeline
from lcm_core.pipeline.sources import MODELS

FULL_LCM, TEACHER = "emoji_lcm.safetensors", "emoji_teacher.safetensors"
LCM_LORA, SKETCH = "emoji_lcm_lora.safetensors", "lcm_suite_sketch.png"
PROMPT = "slice of pizza, noto style"
TINY_VAE = MODELS / "emoji" / "vae_tiny"  # the one that the host's loaders can build
STEPS = 4
TIMESTEPS = (999, 749, 499, 249)  # of ComfyUI's "simple" scheduler


@pytest.fixture(scope="module")
def server(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ComfyUI with the embedded model exported into it, for its own loaders."""
    with Server(checkout, export_into(make_base(tmp_path_factory.mktemp("exported")))) as running:
        yield running


def _stock(checkpoint: str, lora: str | None, cfg: float) -> tuple[Prompt, Graph]:
    """Euler in four steps, which adds no noise on the way, with nothing but stock nodes."""
    g = Graph()
    model, clip, vae, *_ = g.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    if lora:
        both = {"model": model, "clip": clip, "strength_model": 1.0, "strength_clip": 1.0}
        model, clip, *_ = g.add("LoraLoader", lora_name=lora, **both)
    settings = {"seed": 1, "steps": STEPS, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "cfg": cfg}
    links: dict[str, Link] = {"positive": g.text(clip, PROMPT), "negative": g.text(clip, "")}
    painted = g.add("KSampler", model=model, latent_image=g.canvas(1), **settings, **links)[0]
    g.save(painted, vae, "native")
    return g.prompt, g


def pictures(server: Server, outputs: dict[str, Any]) -> list[Any]:
    """All saved pictures as (H, W, 3) integers."""
    saved = [image for output in outputs.values() for image in output.get("images", ())]
    return [numpy.asarray(Image.open(io.BytesIO(server.file(image))).convert("RGB"), int) for image in saved]


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal but for rounding: ComfyUI cuts off where lcm_core rounds."""
    assert ours.shape == theirs.shape
    assert numpy.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize(
    ("checkpoint", "lora", "unet"),
    [(TEACHER, None, "teacher"), (TEACHER, LCM_LORA, "teacher"), (FULL_LCM, None, "lcm")],
    ids=["teacher", "lora", "full-lcm"],
)
def test_stock_nodes_paint_the_picture_of_the_pipeline(
    server: Server, checkpoint: str, lora: str | None, unet: str
) -> None:
    """Wrong when a weight, the tokenizer, the heads, the prediction type, the LoRA or the VAE is read otherwise."""
    pipe = Pipeline.load("emoji", device="cpu", vae=TINY_VAE, unet=unet, lora=[("lcm_lora", 1.0)] if lora else ())
    guided = unet == "lcm"  # its guidance is in the weights; ComfyUI's loader settles it at the model's default
    scale = pipe.model.settings().guidance_scale if guided else 2.0
    expected = pipe(PROMPT, seed=1, sampler="euler", timesteps=TIMESTEPS, guidance_scale=scale).images[0]
    prompt, _ = _stock(checkpoint, lora, 1.0 if guided else scale)
    [painted] = pictures(server, server.run(prompt))
    assert_same(numpy.asarray(expected, int), painted)


def test_the_other_prediction_type_is_followed(server: Server, tmp_path: Path) -> None:
    """Wrong when the prediction type is not read from the file. The picture means nothing, but must be the same."""
    from lcm_core.cli.main import main

    other = tmp_path / "other"
    other.mkdir()
    for part in (MODELS / "emoji").iterdir():
        if part.name != "model.json":
            (other / part.name).symlink_to(part)
    card = json.loads((MODELS / "emoji" / "model.json").read_text(encoding="utf-8"))
    card["prediction_type"] = "epsilon" if card["prediction_type"] == "v_prediction" else "v_prediction"
    (other / "model.json").write_text(json.dumps(card), encoding="utf-8")
    command = ["export", "--model", str(other), "--unet", "teacher", "--to", "comfyui", "--path", str(server.base)]
    assert main(command) == 0
    pipe = Pipeline.load(other, device="cpu", vae=TINY_VAE, unet="teacher")
    expected = pipe(PROMPT, seed=1, sampler="euler", timesteps=TIMESTEPS, guidance_scale=1.0).images[0]
    [painted] = pictures(server, server.run(_stock("other_teacher.safetensors", None, 1.0)[0]))
    assert_same(numpy.asarray(expected, int), painted)


def test_outlines_guide_as_they_were_trained_to(server: Server) -> None:
    """Wrong when the T2I-Adapter's features reach other layers, or another size, than in training."""
    import torch
    from diffusers import T2IAdapter

    from lcm_core.diffusion.consistency import Denoiser
    from lcm_core.diffusion.grids import get_sigmas_lcm
    from lcm_core.diffusion.samplers import initial_latents, initial_noise
    from lcm_core.files.safetensors import read_safetensors
    from lcm_core.pipeline.image import load_image, to_pil

    sketch = server.base / "input" / SKETCH
    g = Graph()
    model, clip, vae, *_ = g.add("CheckpointLoaderSimple", ckpt_name=TEACHER)
    control = g.add("LCMAdapterLoader", control_net_name=CONTROL)[0]
    image, text = g.picture(SKETCH)[0], g.text(clip, PROMPT)
    guided = g.add("ControlNetApply", conditioning=text, control_net=control, image=image, strength=1.0)[0]
    settings = {"seed": 1, "steps": 1, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0, "cfg": 1.0}
    links = {"model": model, "latent_image": g.canvas(1), "positive": guided, "negative": text}
    g.save(g.add("KSampler", **settings, **links)[0], vae, "guided")
    [painted] = pictures(server, server.run(g.prompt))

    own = Pipeline.load("emoji", device="cpu", vae=TINY_VAE, unet="teacher").model
    channels = list(own.unet.model.config.block_out_channels)
    adapter = T2IAdapter(1, channels, num_res_blocks=2, downscale_factor=8, adapter_type="full_adapter")
    adapter.load_state_dict(
        {k: v.float() for k, v in read_safetensors(MODELS / "emoji" / "control" / "emoji_canny.safetensors")[0].items()}
    )
    hint = (load_image(sketch, (SIZE, SIZE)) + 1).mean(1, keepdim=True) / 2
    with torch.no_grad():
        features = adapter(hint)
        words = own.encode([PROMPT], SIZE, SIZE)["encoder_hidden_states"]

        def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return own.unet.model(x, t, words, down_intrablock_additional_residuals=list(features), return_dict=False)[
                0
            ]

        sigmas = get_sigmas_lcm(own.diffusion.process, None, timesteps=(999,))
        x = initial_latents(initial_noise([1], (4, SIZE // 8, SIZE // 8)), float(sigmas[0]))
        latents = Denoiser(network, own.diffusion)(x, sigmas[:1])
        expected = to_pil(own.vae.decode(latents))[0]
    assert_same(numpy.asarray(expected, int), painted)


def test_encoding_and_decoding_is_that_of_lcm_core(server: Server) -> None:
    """Wrong when the small VAE's encoder is not the one that was trained."""
    import torch

    from lcm_core.pipeline.image import load_image, to_pil

    sketch = server.base / "input" / "lcm_suite_sketch.png"
    g = Graph()
    _, _, vae, *_ = g.add("CheckpointLoaderSimple", ckpt_name=TEACHER)
    latent = g.add("VAEEncode", pixels=g.picture(sketch.name)[0], vae=vae)[0]
    g.save(latent, vae, "round trip")
    [painted] = pictures(server, server.run(g.prompt))
    own = Pipeline.load("emoji", device="cpu", vae=TINY_VAE, unet="teacher").model.vae
    with torch.no_grad():
        expected = to_pil(own.decode(own.encode(load_image(sketch, (SIZE, SIZE)))))[0]
    assert_same(numpy.asarray(expected, int), painted)


def test_a_checkpoint_saved_by_comfyui_paints_the_same(server: Server) -> None:
    """Wrong when saving loses the prediction type, the settled guidance or a part of the model."""
    g = Graph()
    model, clip, vae, *_ = g.add("CheckpointLoaderSimple", ckpt_name=FULL_LCM)
    g.add("CheckpointSave", model=model, clip=clip, vae=vae, filename_prefix="saved/again")
    server.run(g.prompt)
    [file] = (server.base / "output" / "saved").glob("again*.safetensors")
    file.rename(server.base / "models" / "checkpoints" / "again.safetensors")
    [first] = pictures(server, server.run(_stock(FULL_LCM, None, 1.0)[0]))
    [second] = pictures(server, server.run(_stock("again.safetensors", None, 1.0)[0]))
    assert_same(first, second)
