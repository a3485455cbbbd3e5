"""What a run leaves, opened with the programs that it is for."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcm_core.errors import InputError
from lcm_core.files.checkpoint import ModelInfo
from lcm_core.files.recommended import FULL_LCM_GUIDANCE, Recommended, read_recommended
from lcm_core.files.safetensors import read_safetensors
from lcm_core.pipeline.generate import Inputs, noise_source, paint
from lcm_core.pipeline.model import load_model
from lcm_core.pipeline.prompts import encode_prompts
from lcm_core.pipeline.sources import ModelSource, recommended_for
from trainer.card import model_card
from trainer.cli.main import main
from trainer.config import DistillConfig, StudentConfig
from trainer.methods.config import Dmd2Config, LcdConfig
from trainer.outputs import recommended_of

FULL_LCM = Recommended(guidance_scale=FULL_LCM_GUIDANCE, teacher_guidance_scale=FULL_LCM_GUIDANCE)
PROMPT, SEED, STEPS = "picture number 3", 7, 3


def _distil(teacher, photos, output, *words):
    options = ["--data", photos, "--steps", 4, "--batch-size", 4, "--rank", 2, "--warmup-steps", 1]
    quick = ["--learning-rate", 0.03, "--samples", 0, "--preview-every", 0, "--no-tensorboard", "--name", "mine"]
    command = ["distill", "--teacher", teacher, "--output", output, *options, *quick, *words]
    assert main([str(word) for word in command]) == 0
    return output


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def lora_run(request, teachers, photos, tmp_path_factory):
    teacher = teachers(request.param)
    return teacher, _distil(teacher, photos, tmp_path_factory.mktemp("lora"))


def _paint(model, guidance_scale):
    """One picture in [0, 1] by `lcm_core`, with the sampler that the model's files ask for."""
    given = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale, "width": 64, "height": 64}
    chosen = replace(model.settings(), **given, gamma=0.0)  # diffusers' eta, 0 where it is not given
    cond = encode_prompts(model, [PROMPT], (64, 64), "plain")
    with torch.no_grad():
        return paint(model, Inputs(cond, None, noise_source([SEED], model.device)), chosen).clamp(-1, 1) / 2 + 0.5


def _diffusers(folder, unet):
    from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    # diffusers would clip x0 of latents to 1 by default, which no sampler of Stable Diffusion does
    scheduler = LCMScheduler.from_config(scheduler.config, clip_sample=False)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _paint_with_diffusers(pipe, guidance_scale):
    generator = torch.Generator().manual_seed(SEED)
    options = {"num_inference_steps": STEPS, "height": 64, "width": 64, "output_type": "pt"}
    return pipe(PROMPT, guidance_scale=guidance_scale, generator=generator, **options).images


def test_the_lora_paints_the_same_picture_in_diffusers_with_peft_and_here(lora_run):
    from diffusers import UNet2DConditionModel

    teacher, output = lora_run
    file = output / "mine_lora.safetensors"
    pipe = _diffusers(teacher, UNet2DConditionModel.from_pretrained(teacher / "unet"))
    without = _paint_with_diffusers(pipe, 1.0)
    pipe.load_lora_weights(str(file))
    theirs = _paint_with_diffusers(pipe, 1.0)
    ours = _paint(load_model(teacher, "cpu", "float32", lora=[(file, 1.0)]), 1.0)
    assert (theirs - without).abs().max() > 0.01, "the LoRA does nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_lora_file_says_what_it_is(lora_run):
    teacher, output = lora_run
    tensors, metadata = read_safetensors(output / "mine_lora.safetensors")
    assert {name.split(".", 1)[1] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(name.startswith("lora_unet_") for name in tensors)
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert json.loads(metadata["lcm_suite.recommended"]) == {"sampler": "lcm", "steps": 4}
    assert json.loads(metadata["lcm_suite.distill"])["teacher"] == str(teacher)


def test_the_run_leaves_everything_that_was_promised(lora_run):
    _, output = lora_run
    names = {path.name for path in output.iterdir()}
    promised = {"README.md", "report.html", "workflow_comfyui.json", "config.json", "results.json", "skipped.json"}
    assert promised <= names
    log = [json.loads(line) for line in (output / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2, 3]
    card = (output / "README.md").read_text()
    assert "mine_lora.safetensors" in card
    assert "guidance scale 1 " in card


@pytest.mark.parametrize(
    ("teacher", "family", "loads"),
    [
        ("a/my.safetensors", "sd1", 'StableDiffusionPipeline.from_single_file("a/my.safetensors")'),
        ("a/my.safetensors", "sdxl", 'StableDiffusionXLPipeline.from_single_file("a/my.safetensors")'),
        ("a/folder", "sd2", 'DiffusionPipeline.from_pretrained("a/folder")'),
        ("emoji", "sd1", 'DiffusionPipeline.from_pretrained("emoji-teacher")'),
    ],
)
def test_the_card_s_python_loads_the_teacher_as_diffusers_can(teacher, family, loads):
    import diffusers

    card = model_card(DistillConfig(teacher=teacher, output="out"), ModelInfo(family), Recommended("lcm", 4), [], "")
    code = card.split("```python\n")[1].split("```")[0]
    assert loads in code
    names = code.splitlines()[0].removeprefix("from diffusers import ").split(", ")
    assert all(hasattr(diffusers, name) for name in names)
    assert hasattr(getattr(diffusers, names[0]), loads.split("(")[0].split(".")[1])
    if teacher == "emoji":  # which diffusers cannot load by name, and whose LoRA is for its teacher
        assert "python -m lcm_core export --model emoji --unet teacher --to diffusers --path emoji-teacher" in code
        assert "--model emoji --unet teacher --lora" in card


def test_the_card_says_what_dmd2_leaves_out():
    config = DistillConfig(teacher="emoji", output="out", method=Dmd2Config())
    assert "without the paper's GAN loss" in model_card(config, ModelInfo("sd1"), Recommended("lcm", 4), [], "")
    config = replace(config, method=Dmd2Config(gan_weight=0.001))
    assert ", GAN weight 0.001." in model_card(config, ModelInfo("sd1"), Recommended("lcm", 4), [], "")


def test_the_workflow_uses_the_result_and_its_wires_meet(lora_run):
    teacher, output = lora_run
    graph = json.loads((output / "workflow_comfyui.json").read_text())
    for node in graph.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in graph
    by_kind = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert by_kind["LoraLoaderModelOnly"]["lora_name"] == "mine_lora.safetensors"
    assert (by_kind["KSampler"]["sampler_name"], by_kind["KSampler"]["scheduler"]) == ("lcm", "simple")
    expected = "v_prediction" if teacher.name == "v_prediction" else "lcm"
    assert by_kind["ModelSamplingDiscrete"]["sampling"] == expected


@pytest.mark.parametrize(("method", "steps", "gamma"), [("tcd", 4, 0.3), ("segmented", 3, 0.0)])
def test_a_trajectory_student_brings_its_own_sampler(teachers, photos, tmp_path, method, steps, gamma):
    """ComfyUI has no TCD sampler; with lcm such a student would lose what sets it apart."""
    words = ["--method", method, "--steps", 1, "--original-steps", 10]
    words += ["--phases", 3] if method == "segmented" else []
    output = _distil(teachers(), photos, tmp_path, *words)
    file = output / "mine_lora.safetensors"
    assert read_recommended(file).sampler == "tcd"
    model = load_model(teachers(), "cpu", lora=[(file, 1.0)])
    assert model.recommended == Recommended("tcd", steps, gamma, 10)
    assert "original_inference_steps=10)" in (output / "README.md").read_text()
    graph = json.loads((output / "workflow_comfyui.json").read_text())
    by_kind = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert by_kind["LCMSampler"] == {"sampler": "tcd", "gamma": gamma}
    assert by_kind["LCMScheduler"]["steps"] == steps
    for node in graph.values():
        assert all(not isinstance(value, list) or value[0] in graph for value in node["inputs"].values())


@pytest.mark.parametrize("student", ["lora", "full"])
def test_distribution_matching_goes_on_from_an_earlier_student(teachers, photos, tmp_path, student):
    words = ["--student", student, "--steps", 3]
    first = _distil(teachers(), photos, tmp_path / "first", *words, "--name", "first")
    start = first / ("first_lora.safetensors" if student == "lora" else "first.safetensors")
    more = ["--method", "dmd2", "--phases", 2, "--critic-updates", 2, "--start", start, "--accumulation", 2]
    output = _distil(teachers(), photos, tmp_path / "second", *words, *more)
    file = output / ("mine_lora.safetensors" if student == "lora" else "mine.safetensors")
    before, after = (read_safetensors(path)[0] for path in (start, file))
    names = [name for name in after if name.endswith(("lora_up.weight", "time_embed.2.weight"))]
    old, new = (torch.cat([tensors[name].float().flatten() for name in names]) for tensors in (before, after))
    assert 0 < (new - old).norm() < old.norm(), "it did not start from the earlier student's"
    state = read_safetensors(output / "run" / "state.safetensors")[0]
    assert any(name.startswith("online.critic.") for name in state)
    assert _distil(teachers(), photos, output, *words, *more) == output  # a finished run is only read again


@pytest.fixture(scope="module", params=["lcd", "tcd"])
def full_run(request, teachers, photos, tmp_path_factory):
    teacher = teachers("v_prediction", zero_snr=True)
    words = ["--student", "full", "--method", request.param, "--solver", "dpmpp_2s", "--original-steps", 20]
    return request.param, _distil(teacher, photos, tmp_path_factory.mktemp("full"), *words)


def test_the_full_student_paints_the_same_from_its_folder_its_file_and_in_diffusers(full_run):
    from diffusers import DiffusionPipeline

    method, output = full_run
    models = [load_model(output / name, "cpu", "float32") for name in ("mine.safetensors", "diffusers")]
    said = Recommended("lcm", 4, None, 20) if method == "lcd" else Recommended("tcd", 4, 0.3, 20)
    assert [model.recommended for model in models] == [FULL_LCM | said] * 2
    from_file, from_folder = (_paint(model, 4.0) for model in models)
    torch.testing.assert_close(from_file, from_folder, rtol=0, atol=1e-6)
    pipe = DiffusionPipeline.from_pretrained(output / "diffusers", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler).__name__ == {"lcd": "LCMScheduler", "tcd": "TCDScheduler"}[method]
    torch.testing.assert_close(_paint_with_diffusers(pipe, 4.0), from_folder, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("usual", "w_min", "w_max", "expected"),
    [(None, 2, 14, 8), (None, 1, 1, 2), (2.0, 0, 3, 2), (7.5, 0, 3, 4), (2, 3, 5, 4)],
)
def test_a_full_student_asks_for_its_teacher_s_guidance_where_it_has_learnt_it(usual, w_min, w_max, expected):
    """A student of w 1 alone was painted with the usual scale of 8, which it has never seen."""
    said = Recommended(teacher_guidance_scale=usual)
    source = ModelSource(*[Path("a")] * 4, ModelInfo("sd1"), recommended=said)
    config = DistillConfig(
        teacher="a", output="out", method=LcdConfig(w_min=w_min, w_max=w_max), student=StudentConfig("full")
    )
    asked = recommended_of(config, source, source.info)
    assert asked == Recommended("lcm", 4, guidance_scale=expected)
    assert recommended_for(replace(source, recommended=asked), guidance_embedding=True).guidance_scale == expected
    assert f"guidance_scale={expected})" in model_card(config, source.info, asked, [], "")


def test_a_folder_from_elsewhere_is_sampled_as_its_scheduler_says(full_run, tmp_path):
    """diffusers' own folders name a scheduler and its grid, and nothing else of ours."""
    method, output = full_run
    folder = shutil.copytree(output / "diffusers", tmp_path / "copy")
    file = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(file.read_text())
    assert scheduler.pop("_lcm_suite")["steps"] == 4
    file.write_text(json.dumps(scheduler | {"original_inference_steps": 40}))
    model = load_model(folder, "cpu")
    assert model.recommended == FULL_LCM | Recommended("lcm" if method == "lcd" else "tcd", original_steps=40)
    file.write_text(json.dumps(scheduler | {"original_inference_steps": "many"}))
    with pytest.raises(InputError, match=r"original_steps 'many'; it must be"):
        load_model(folder, "cpu")


def test_the_single_file_keeps_the_guidance_input_and_the_marks(full_run):
    method, output = full_run
    tensors, metadata = read_safetensors(output / "mine.safetensors")
    projection = tensors["model.diffusion_model.time_embed.cond_proj.weight"]
    assert projection.shape == (32, 256)
    assert projection.any()
    assert {"v_pred", "ztsnr"} <= tensors.keys()
    assert json.loads(metadata["lcm_suite.distill"])["method"]["kind"] == method


def test_more_steps_replace_the_results(teachers, photos, tmp_path):
    words = ["--student", "full", "--method", "finetune"]
    _distil(teachers("epsilon"), photos, tmp_path, *words)
    before = read_safetensors(tmp_path / "diffusers/unet/diffusion_pytorch_model.safetensors")[0]
    before = {name: tensor.clone() for name, tensor in before.items()}
    _distil(teachers("epsilon"), photos, tmp_path, *words, "--steps", 6)
    after = read_safetensors(tmp_path / "diffusers/unet/diffusion_pytorch_model.safetensors")[0]
    assert any(not torch.equal(before[name], after[name]) for name in after)
