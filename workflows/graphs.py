"""The example workflows in ComfyUI's API format, one function each; its docstring is the note in the graph.

All of them run on the embedded model, which LCM Checkpoint Loader and LCM LoRA Convert list; nothing is to be exported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from downloads import DOWNLOADS
from graph import CONTROL, FLOW, HOLE, SIZE, SKETCH, Graph, Prompt


def text_to_image(g: Graph) -> None:
    """# Text to image with a full LCM

    Press **Run**: four pictures in four steps each.

    - **Prompt**: an emoji's name and a style: *noto*, *fluent* or *twemoji*.
    - **Your own model**: choose another full LCM in *LCM Checkpoint Loader*, and the size that it was made for
      (512 for SD 1.5).
    - **guidance_scale** 0 takes the model's own. A full LCM follows any value at no cost: higher is stricter.
    """
    model, clip, vae, *_ = g.full_lcm()
    positive = g.text(clip, "panda, noto style")
    g.save(g.paint(model, positive, g.canvas()), vae, "text to image")


def lcm_lora(g: Graph) -> None:
    """# LCM-LoRA on any checkpoint

    An ordinary checkpoint and an LCM-LoRA make pictures in four steps, with the stock KSampler.

    - **Your own model**: choose it in *Any checkpoint*, an LCM-LoRA of its family in *LCM-LoRA*, and its size (512 for
      SD 1.5, 1024 for SDXL). A style LoRA goes between the two.
    - *LCM Apply* sets the sampling that the LoRA was made for and says what it found.
    - **KSampler**: sampler *lcm*, scheduler *simple*, cfg 1 to 2. At cfg 1 the negative prompt is not used.
    """
    model, clip, vae = g.teacher_with_lora()
    model = g.add("LCMApply", "LCM Apply", model=model, guidance_scale=0.0, original_steps=50)[0]
    positive, negative = g.text(clip, "hamburger, fluent style"), g.text(clip, "", "Negative prompt")
    settings = {"seed": 1, "steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple", "denoise": 1.0}
    links = {"model": model, "positive": positive, "negative": negative, "latent_image": g.canvas()}
    g.save(g.add("KSampler", "KSampler", **settings, **links)[0], vae, "lcm lora")


def image_to_image(g: Graph) -> None:
    """# Image to image

    A sketch becomes a picture.

    - **Your picture**: drop yours on *Load Image*. *Scale* brings it to the model's size.
    - **strength**: how much is painted over. 1 ignores the sketch, 0.3 hardly changes it. All steps are run, and the
      first one starts at exactly that noise.
    """
    model, clip, vae, *_ = g.full_lcm()
    scaled = g.scaled(g.picture(SKETCH)[0])
    latent = g.add("VAEEncode", "VAE Encode", pixels=scaled, vae=vae)[0]
    four = g.add("RepeatLatentBatch", "How many", samples=latent, amount=4)[0]
    positive = g.text(clip, "red apple, fluent style")
    g.save(g.paint(model, positive, four, strength=0.7), vae, "image to image")


def inpainting(g: Graph) -> None:
    """# Inpainting

    Only the hole is painted; the rest of the picture stays.

    - **Your picture**: drop yours on *Load Image*, right-click it, *Open in MaskEditor*, and draw over what should
      change.
    - **strength** 1 forgets what was there; lower keeps some of it.
    """
    model, clip, vae, *_ = g.full_lcm()
    image, mask, *_ = g.picture(HOLE)
    latent = g.add("VAEEncode", "VAE Encode", pixels=image, vae=vae)[0]
    masked = g.add("SetLatentNoiseMask", "What to repaint", samples=latent, mask=mask)[0]
    positive = g.text(clip, "red apple, fluent style")
    g.save(g.paint(model, positive, masked), vae, "inpainting")


def two_pass_upscale(g: Graph) -> None:
    """# Two passes

    The first pass composes at half the size, the second adds detail at the whole.

    - **Second pass**: *strength* 0.3 to 0.6; more invents more.
    - **Size**: what the model knows best; the embedded one has never seen more than 128 pixels, so that here the first
      pass takes 64.
    - **Upscale**: *scale_by* 1.5 to 2.
    """
    model, clip, vae, *_ = g.full_lcm()
    positive = g.text(clip, "crying face, fluent style")
    first = g.paint(model, positive, g.canvas(1, SIZE // 2), "First pass")
    larger = g.add("LatentUpscaleBy", "Upscale", samples=first, upscale_method="bicubic", scale_by=2.0)[0]
    g.save(g.paint(model, positive, larger, "Second pass", strength=0.5), vae, "two passes")


def controlnet(g: Graph) -> None:
    """# ControlNet with an LCM

    The outlines of a picture guide four steps of painting.

    - **Your picture**: drop yours on *Load Image*; *Canny* finds its outlines.
    - **ControlNet**: *strength* says how closely to follow them.
    - **Your own model**: any ControlNet or T2I-Adapter of the checkpoint's family works with an LCM. The embedded model
      comes with a small T2I-Adapter, which stands in for one; for its widths it needs *LCM Adapter Loader*.
    """
    model, clip, vae, *_ = g.full_lcm()
    edges = g.add("Canny", "Outlines", image=g.scaled(g.picture(SKETCH)[0]), low_threshold=0.2, high_threshold=0.4)[0]
    g.add("PreviewImage", "What the ControlNet sees", images=edges)
    control = g.add("LCMAdapterLoader", "ControlNet", control_net_name=CONTROL)[0]
    prompts = {
        "positive": g.text(clip, "red apple, fluent style"),
        "negative": g.text(clip, "", "Negative prompt"),
    }
    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    guided = g.add(
        "ControlNetApplyAdvanced", "Apply ControlNet", control_net=control, image=edges, **settings, **prompts
    )
    g.save(g.paint(model, guided[0], g.canvas(), negative=guided[1]), vae, "controlnet")


def tcd(g: Graph) -> None:
    """# TCD: the same speed, finer detail

    Trajectory sampling with its *gamma*, for TCD-LoRAs and LCM-LoRAs, in the stock *SamplerCustom*.

    - **LCM Sampler**: *gamma* 0 adds no fresh noise and always gives the same picture; 0.3 is usual; with 8 steps and
      more, try 0.5 and above.
    - **LCM Scheduler**: *strength* below 1 with an encoded picture is image to image; *timesteps* takes your own.
    """
    model, clip, vae = g.teacher_with_lora()
    model = g.add("LCMApply", "LCM Apply", model=model, guidance_scale=0.0, original_steps=50)[0]
    sampler = g.add("LCMSampler", "LCM Sampler", sampler="tcd", gamma=0.3)[0]
    grid = {"steps": 4, "strength": 1.0, "original_steps": 50, "timesteps": ""}
    sigmas = g.add("LCMScheduler", "LCM Scheduler", model=model, **grid)[0]
    positive, negative = g.text(clip, "lion, fluent style"), g.text(clip, "", "Negative prompt")
    settings = {"add_noise": True, "noise_seed": 1, "cfg": 1.0}
    links = {"model": model, "positive": positive, "negative": negative, "latent_image": g.canvas()}
    painted = g.add("SamplerCustom", "SamplerCustom", **settings, **links, sampler=sampler, sigmas=sigmas)[0]
    g.save(painted, vae, "tcd")


def latent_travel(g: Graph) -> None:
    """# Latent travel: an animation

    Prompts and seeds travel together, and the noise of every step with them, so that nothing flickers.

    - **LCM Travel**: *seeds* one for each prompt, or one for all; *frames*; *loop* travels back to the start.
    - Each keyframe is exactly the picture that *LCM KSampler* paints of its prompt and seed.
    - **Save**: *fps* is the speed.
    """
    model, clip, vae, *_ = g.full_lcm()
    prompts = {
        "positive_1": g.text(clip, "red apple, fluent style", "From"),
        "positive_2": g.text(clip, "lemon, fluent style", "To"),
    }
    options = {"seeds": "1, 2", "frames": 12, "steps": 4, "guidance_scale": 0.0, "sampler": "lcm", "strength": 1.0}
    course = {"mode": "slerp", "easing": "smooth", "loop": True, "gamma": 0.3, "original_steps": 50}
    frames = g.add("LCMTravel", "LCM Travel", model=model, latent_image=g.canvas(1), **options, **course, **prompts)[0]
    images = g.add("VAEDecode", "VAE Decode", samples=frames, vae=vae)[0]
    settings = {"filename_prefix": "LCM Suite/travel", "fps": 8.0, "lossless": True, "quality": 90, "method": "default"}
    g.add("SaveAnimatedWEBP", "Save", images=images, **settings)


def distil(g: Graph) -> None:
    """# Distil in the graph, and use the result

    An ordinary checkpoint paints pictures in many steps; *LCM Distiller* learns an LCM-LoRA from them, which then
    paints in four.

    - **Your own model**: choose it in *Any checkpoint*. For a LoRA of general use give *LCM Distiller* a *folder* of
      pictures with .txt captions, connect *clip* and *vae*, and take 1,000 steps, rank 64, learning rate 1e-4. It then
      needs no latents.
    - **Interrupt** keeps what was learnt; queueing again goes on. The LoRA is in *models/loras* under *output_name*.
    - **w** is the guidance that it learns to do without; afterwards use cfg 1.
    - MODEL has the LoRA already. *LORA_MODEL* goes into the stock *Load LoRA Model*, to give it another strength.
    """
    model, clip, vae, *_ = g.any_checkpoint()
    positive, negative = g.text(clip, "red apple, fluent style"), g.text(clip, "", "Negative prompt")
    small = SIZE // 2  # a quarter of the time
    slow = {"seed": 1, "steps": 20, "cfg": 2.0, "sampler_name": "dpmpp_2m", "scheduler": "simple", "denoise": 1.0}
    prompts = {"positive": positive, "negative": negative}
    examples = g.add("KSampler", "20 steps", model=model, latent_image=g.canvas(8, small), **slow, **prompts)[0]
    training = {"output_name": "my_lcm_lora", "steps": 40, "batch_size": 2, "learning_rate": 0.001, "rank": 8, "w": 1.0}
    rest = {"method": "lcd", "preview_every": 20, "seed": 1, "folder": "", "resolution": small}
    rest["if_exists"] = "ask"
    links = {"model": model, "clip": clip, "vae": vae, "latents": examples, "positive": positive}
    learnt = g.add("LCMDistiller", "LCM Distiller", **training, **rest, **links)
    g.save(g.paint(learnt[0], positive, g.canvas(size=small), "4 steps", guidance_scale=1.0), vae, "distilled")
    g.add("PreviewImage", "While it learnt", images=learnt[3])
    g.add("PreviewImage", "Loss", images=learnt[4])


def steps_grid(g: Graph) -> None:
    """# Steps grid

    One prompt and seed at several numbers of steps and guidance scales, side by side with labels: see at a glance what
    suits a model.

    - **LCM Steps Grid**: the lists in *steps* (columns) and *guidance_scales* (rows; 0 is the model's own).
    - Change the model, keep the seed, and compare two sheets.
    """
    model, clip, vae, *_ = g.full_lcm()
    lists = {"seed": 1, "steps": "1, 2, 4, 8", "guidance_scales": "1, 2, 4", "sampler": "lcm", "strength": 1.0}
    links = {"model": model, "latent_image": g.canvas(1), "vae": vae}
    positive = g.text(clip, "lion, fluent style")
    rest = {"gamma": 0.3, "original_steps": 50}
    grid = g.add("LCMStepsGrid", "LCM Steps Grid", **lists, **rest, **links, positive=positive)[0]
    g.add("SaveImage", "Save", filename_prefix="LCM Suite/steps grid", images=grid)


def flow_model(g: Graph) -> None:
    """# A flow model in 4 steps

    SD3, Flux, Z-Image, Qwen-Image, Wan and their kin are flow models. All nodes of LCM Suite take them; *LCM KSampler*
    and *LCM Apply* see from the MODEL what it is.

    - **Your own model**: load it with the stock nodes, with a few-step LoRA of its family in *LCM-LoRA*.
    - The embedded model is the emoji teacher as a flow model, by a change of variables; it paints the same pictures,
      and its LoRA fits.
    - **KSampler**: sampler *lcm* or *lcm_suite*, scheduler *simple* or *lcm_grid*, cfg 1.
    """
    model, clip, vae = g.teacher_with_lora(FLOW)
    positive, negative = g.text(clip, "automobile, noto style"), g.text(clip, "", "Negative prompt")
    settings = {"seed": 1, "steps": 4, "cfg": 1.0, "sampler_name": "lcm_suite", "scheduler": "lcm_grid", "denoise": 1.0}
    links = {"model": model, "positive": positive, "negative": negative, "latent_image": g.canvas()}
    g.save(g.add("KSampler", "KSampler", **settings, **links)[0], vae, "flow model")


WORKFLOWS: dict[str, Callable[[Graph], None]] = {
    "LCM 01 Text to image in 4 steps": text_to_image,
    "LCM 02 LCM-LoRA on any checkpoint": lcm_lora,
    "LCM 03 Image to image in 4 steps": image_to_image,
    "LCM 04 Inpainting in 4 steps": inpainting,
    "LCM 05 Upscale in two passes": two_pass_upscale,
    "LCM 06 ControlNet in 4 steps": controlnet,
    "LCM 07 TCD for finer detail": tcd,
    "LCM 08 Latent travel animation": latent_travel,
    "LCM 09 Distil your own LCM-LoRA": distil,
    "LCM 10 Compare steps in a grid": steps_grid,
    "LCM 11 Flow model in 4 steps": flow_model,
}
"""The workflows that run at once, on the embedded model."""
_ALL = WORKFLOWS | DOWNLOADS


def prompt_of(name: str) -> Prompt:
    """A workflow in API format."""
    graph = Graph()
    _ALL[name](graph)
    return graph.prompt


def note_of(name: str) -> str:
    """What a workflow is and what to change in it, in Markdown."""
    return inspect.cleandoc(_ALL[name].__doc__ or "")
