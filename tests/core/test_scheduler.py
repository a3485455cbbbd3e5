"""The scheduler for diffusers' own pipelines: the numbers of diffusers' schedulers, and of this suite's pipeline."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    TCDScheduler,
)
from transformers import CLIPTokenizer

from lcm_core.errors import InputError
from lcm_core.pipeline import Pipeline
from lcm_core.pipeline.scheduler import LCMSuiteScheduler
from lcm_core.pipeline.sources import MODELS

PROMPT = "a red apple, noto style"
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CONFIG = PNDMScheduler(**SCHEDULE, prediction_type="v_prediction").config
"""The embedded model's, as a Stable Diffusion folder would say it."""


@pytest.fixture(scope="module")
def emoji():
    """The embedded full LCM, in this suite's pipeline and in diffusers' own."""
    ours = Pipeline.load("emoji", dtype=torch.float32)
    model = ours.model
    parts = {
        "unet": model.unet.model,
        "vae": model.vae.model,
        "text_encoder": model.text.encoders[0].model,
        "tokenizer": CLIPTokenizer.from_pretrained(MODELS / "emoji" / "tokenizer"),
        "scheduler": PNDMScheduler.from_config(CONFIG),
    }
    theirs = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


def _latents(pipe, scheduler, **settings):
    pipe.scheduler = scheduler
    generator = torch.Generator().manual_seed(5)
    given = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"} | settings
    return pipe(PROMPT, generator=generator, **given).images


@pytest.mark.parametrize(("sampler", "other"), [("lcm", LCMScheduler), ("tcd", TCDScheduler)])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_stable_diffusion_pipeline_gives_diffusers_numbers(emoji, sampler, other, steps):
    pipe = emoji[1]
    settings = {"num_inference_steps": steps, "width": 64, "height": 64}
    expected = _latents(pipe, other.from_config(CONFIG), **settings, **({"eta": 0.3} if sampler == "tcd" else {}))
    given = _latents(pipe, LCMSuiteScheduler.from_config(CONFIG, sampler=sampler), **settings)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("sampler", ["lcm", "tcd", "euler"])
def test_other_numbers_than_from_this_suites_pipeline(emoji, sampler):
    ours, theirs = emoji
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "width": 64, "height": 64}
    expected = ours(PROMPT, seed=5, sampler=sampler, output_type="latent", **settings).images
    given = _latents(theirs, LCMSuiteScheduler.from_config(CONFIG, sampler=sampler), **settings)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_pipeline_shares_the_networks_of_diffusers_own(emoji):
    """The same picture, bit for bit, and no second copy of the weights."""
    ours, theirs = emoji
    shared = Pipeline.from_diffusers(theirs)
    assert shared.model.unet.model is theirs.unet
    settings = {"seed": 5, "num_inference_steps": 2, "guidance_scale": 2.0, "width": 64, "height": 64}
    given, expected = (pipe(PROMPT, **settings).images[0] for pipe in (shared, ours))
    assert given.tobytes() == expected.tobytes()
    assert "128 pixels" in repr(shared)


def test_other_pipelines_cannot_be_shared():
    pipe = StableDiffusion3Pipeline(None, FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, None, None)
    with pytest.raises(InputError, match="StableDiffusion3Pipeline has no unet"):
        Pipeline.from_diffusers(pipe)


def test_image_to_image_begins_at_its_strength(emoji):
    pipe = StableDiffusionImg2ImgPipeline(**emoji[1].components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = _latents(pipe, LCMScheduler.from_config(CONFIG), image=picture, strength=0.5)
    given = _latents(pipe, LCMSuiteScheduler.from_config(CONFIG), image=picture, strength=0.5)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("sampler", "other"), [("lcm", FlowMatchLCMScheduler), ("euler", FlowMatchEulerDiscreteScheduler)]
)
def test_stable_diffusion_3_pipeline_gives_diffusers_numbers(sampler, other, shift, steps):
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    scheduler = other(shift=shift)
    pipe = StableDiffusion3Pipeline(transformer, scheduler, None, None, None, None, None, None, None)
    pipe.set_progress_bar_config(disable=True)
    words = {"prompt_embeds": torch.randn(1, 3, 16), "pooled_prompt_embeds": torch.randn(1, 16)}

    def run(scheduler, **grid):
        pipe.scheduler = scheduler
        torch.manual_seed(3)  # this pipeline does not hand its generator to the scheduler
        return pipe(**words, **grid, guidance_scale=0.0, height=64, width=64, output_type="latent").images

    # the even grid, which SD3's own sigmas are not: they end at 1 / T
    expected = run(scheduler, sigmas=[1 - i / steps for i in range(steps)])
    given = run(LCMSuiteScheduler.from_config(scheduler.config, sampler=sampler), num_inference_steps=steps)
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


def test_dynamic_shift_is_that_of_flux():
    scheduler = LCMSuiteScheduler.from_config(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config)
    other = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for each in (scheduler, other):
        each.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)
    torch.testing.assert_close(scheduler.timesteps, other.timesteps)


def test_configurations_are_kept():
    """from_config of any scheduler, saved and loaded again."""
    made = LCMSuiteScheduler.from_config(DDIMScheduler(prediction_type="v_prediction", beta_end=0.02).config, gamma=0.5)
    again = LCMSuiteScheduler.from_config(made.config)
    for scheduler in (made, again):
        assert scheduler.diffusion.prediction_type == "v_prediction"
        assert (scheduler.config.beta_end, scheduler.config.gamma) == (0.02, 0.5)


def test_noise_is_added_as_diffusers_adds_it():
    x0, eps = torch.randn(2, 3, 4, 4, 4).unbind()
    t = torch.tensor([10, 400, 999])
    ours, theirs = LCMSuiteScheduler(), LCMScheduler(beta_schedule="scaled_linear")
    torch.testing.assert_close(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: LCMSuiteScheduler(sampler="heun"), "heun.*lcm, tcd, euler"),
        (lambda: LCMSuiteScheduler(prediction_type="noise"), "noise"),
        (lambda: LCMSuiteScheduler().set_timesteps(sigmas=[1.0, 0.5]), "no flow"),
        (lambda: LCMSuiteScheduler().set_timesteps(60), "60 steps"),
        (lambda: LCMSuiteScheduler().step(torch.zeros(1), 999, torch.zeros(1)), "set_timesteps"),
    ],
)
def test_what_cannot_be_is_named(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()
