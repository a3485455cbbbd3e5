"""The sampling nodes inside a real ComfyUI (COMFYUI_PATH), beside lcm_core on the same model, noise and settings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcm_core.files.checkpoint import AS_FLOW, read_component, save_single_file
from lcm_core.files.recommended import Recommended
from lcm_core.files.safetensors import read_safetensors, write_safetensors
from lcm_core.networks.lora_layers import add_lora, lora_state_dict
from lcm_core.networks.unet import load_unet
from lcm_core.pipeline import generate
from lcm_core.pipeline.model import Model, load_model
from lcm_core.pipeline.settings import Settings
from lcm_core.pipeline.sources import find_source

CHECKOUT = os.environ.get("COMFYUI_PATH")
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not CHECKOUT, reason="COMFYUI_PATH is not set to a ComfyUI checkout"),
]
SCRIPT = Path(__file__).with_name("host_run.py")
SIZE = 8  # of latents
PROMPTS = {"positive": "a slice of pizza, noto style", "negative": "", "other": "a red apple, noto style"}
MODELS = {"full": "lcm", "cfg": "teacher"}
SEED = 3
KINDS = ("epsilon", "v_prediction")
FAMILIES = ("SD3", "Flux", "Z-Image", "Qwen-Image", "Wan")


class AsLatents:
    """In place of a VAE: lcm_core then hands out latents, in the host's scale."""

    def __init__(self, vae: Any) -> None:
        self.latent_channels, self.scale, self.scaling_factor = vae.latent_channels, vae.scale, vae.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Only the scale."""
        return latents / self.scaling_factor


def sampling_cases() -> dict[str, dict[str, Any]]:
    """Inputs of the LCM KSampler by the name of the case, which begins with the model's."""
    cases: dict[str, dict[str, Any]] = {}
    for steps in range(1, 9):
        cases[f"full steps {steps}"] = {"steps": steps, "guidance_scale": 3.0}
        cases[f"cfg steps {steps}"] = {"steps": steps, "guidance_scale": 1.5}
    for scale in (3.0, 5.0, 9.0):
        cases[f"full w {scale - 1:g}"] = {"guidance_scale": scale}
    for strength in (0.3, 0.6, 0.77, 1.0):
        for sampler in ("lcm", "tcd"):
            image = {"strength": strength, "sampler": sampler, "latent": "image"}
            cases[f"full {sampler} strength {strength}"] = {"guidance_scale": 3.0, **image}
            cases[f"cfg {sampler} strength {strength}"] = {"guidance_scale": 1.5, **image}
    for gamma in (0.0, 1.0):
        cases[f"full tcd gamma {gamma:g}"] = {"guidance_scale": 3.0, "sampler": "tcd", "gamma": gamma, "steps": 5}
    cases["cfg own timesteps"] = {"guidance_scale": 1.0, "timesteps": "800, 433, 21"}
    cases["full original_steps 25"] = {"guidance_scale": 3.0, "original_steps": 25, "steps": 3}
    return cases


def layout(folder: Path, prediction: str) -> dict[str, Model]:
    """Both U-Nets of the embedded model as checkpoints, said to predict `prediction`, and as lcm_core's models."""
    checkpoints = folder / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    models = {}
    for name, unet in MODELS.items():
        source = find_source("emoji", unet)
        places = {"unet": source.unet, "vae": source.vae, "text_encoder": source.text}
        parts = {part: read_component(place, part) for part, place in places.items()}
        info = replace(source.info, prediction_type=prediction)
        save_single_file(checkpoints / f"{name}.safetensors", parts, info)
        if name == "cfg":
            save_single_file(checkpoints / "flow.safetensors", parts, info, marks=[AS_FLOW])
        models[name] = load_model("emoji", "cpu", torch.float32, unet=unet)
        models[name].diffusion = replace(models[name].diffusion, prediction_type=prediction)
        models[name].vae = AsLatents(models[name].vae)  # type: ignore[assignment]
    return models


def encode(model: Model, name: str) -> dict[str, Any]:
    """A prompt's conditioning."""
    return model.encode([PROMPTS[name]], 8 * SIZE, 8 * SIZE)


def inputs_of(model: Model, seed: int, scale: float, prompt: str = "positive", image: Any = None) -> generate.Inputs:
    """What lcm_core paints from."""
    guided = model.guidance_embedding_dim is None and scale != 1
    noise = generate.noise_source([seed], torch.device("cpu"))
    x0 = None if image is None else image * model.vae.scaling_factor
    return generate.Inputs(encode(model, prompt), encode(model, "negative") if guided else None, noise, x0=x0)


def settings_of(case: dict[str, Any]) -> Settings:
    """lcm_core's settings of a case."""
    own = {"steps": "num_inference_steps"}
    given = {own.get(key, key): value for key, value in case.items() if key != "latent"}
    if "timesteps" in given:
        given["timesteps"] = tuple(int(word) for word in given["timesteps"].split(","))
        given["num_inference_steps"] = len(given["timesteps"])
    return replace(Settings(**given), width=8 * SIZE, height=8 * SIZE)


def run_host(folder: Path) -> Any:
    """Run the script on a folder; returns its findings."""
    python = os.environ.get("COMFYUI_PYTHON") or f"{str(CHECKOUT).rstrip('/')}-venv/bin/python"
    command = [python if Path(python).exists() else sys.executable, str(SCRIPT), str(CHECKOUT), str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # as a user would start the host
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "findings.json").read_text())


def save_tensors(folder: Path, model: Model) -> torch.Tensor:
    """Prompts and latents for the host; returns the image's latents."""
    generator = torch.Generator().manual_seed(9)
    image = torch.randn(1, 4, SIZE, SIZE, generator=generator) * 4
    tensors = {name: encode(model, name)["encoder_hidden_states"].contiguous() for name in PROMPTS}
    tensors |= {"image": image, "empty": torch.zeros_like(image), "empty two": torch.zeros(2, 4, SIZE, SIZE)}
    tensors["tiny"] = torch.zeros(1, 4, 2, 2)
    tensors |= {"sixteen channels": torch.ones(1, 16, SIZE, SIZE), "video": torch.zeros(1, 4, 3, SIZE, SIZE)}
    tensors["training"] = torch.randn(6, 4, SIZE, SIZE, generator=generator) * 4
    save_file(tensors, folder / "tensors.safetensors")
    return image


@pytest.mark.parametrize("prediction", KINDS)
def test_the_ksampler_paints_as_lcm_core_does(tmp_path: Path, prediction: str) -> None:
    """Steps 1 to 8, strengths .3 to 1, lcm and tcd, guidance as w and as CFG: within 1e-4; and pictures follow w."""
    models = layout(tmp_path, prediction)
    image = save_tensors(tmp_path, models["full"])
    cases = sampling_cases()
    told = [
        {
            "model": f"{name.split()[0]}.safetensors",
            "seed": SEED,
            "latent": case.get("latent", "empty"),
            "inputs": {key: value for key, value in case.items() if key != "latent"},
        }
        for name, case in cases.items()
    ]
    (tmp_path / "cases.json").write_text(json.dumps(told))
    assert run_host(tmp_path) == {}  # no complaints
    results = load_file(tmp_path / "results.safetensors")
    wrong = {}
    for number, (name, case) in enumerate(cases.items()):
        model, settings = models[name.split()[0]], settings_of(case)
        x0 = image if "latent" in case else None
        expected = generate.paint(model, inputs_of(model, SEED, settings.guidance_scale, image=x0), settings)
        scale = model.vae.scaling_factor  # the bar is for the sampler's own latents, of unit size
        if prediction != find_source("emoji").info.prediction_type:  # misread, a network gives latents of another size
            scale = min(scale, 1 / float(expected.std()))
        difference = float((results[str(number)] - expected).abs().max()) * scale
        if not difference <= 1e-4:
            wrong[name] = difference
    assert not wrong
    w2, w8 = (results[str(list(cases).index(f"full w {w}"))] for w in (2, 8))
    assert (w2 - w8).abs().max() > 0.05


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What all the other trials of the script found, in one run of the host."""
    folder = tmp_path_factory.mktemp("host")
    models = layout(folder, find_source("emoji").info.prediction_type)
    save_tensors(folder, models["full"])
    loras = folder / "models" / "loras"
    loras.mkdir()
    unet = load_unet(find_source("emoji", "teacher").unet, "cpu", torch.float32)
    width = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.in_features
    save_file(peft_lora(width), loras / "peft.safetensors")
    save_file(peft_lora(1280), loras / "wide.safetensors")
    stated = Recommended("tcd", 2, 0.0, 10).metadata()
    save_file(peft_lora(width), loras / "phased.safetensors", stated)
    cfg = folder / "models" / "checkpoints" / "cfg.safetensors"
    tensors, metadata = read_safetensors(cfg)
    write_safetensors(cfg.with_name("phased.safetensors"), tensors, {**metadata, **stated})
    (folder / "models" / "checkpoints" / "broken.safetensors").write_bytes(b"PK\x03\x04 not what it says")
    return run_host(folder)


def peft_lora(width: int, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA in peft's layout for the middle block's self-attention."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        key = f"base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(width, rank, generator=generator)
    return tensors


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_model_is_fed_the_right_mixture(findings: Any, family: str) -> None:
    """A tiny model of the host's own class whose x0 is known, lcm and tcd: mean (1 - s) x0 and spread s in each of 1,
    2, 4, 8 steps, from noise, from a picture at four strengths, and around a mask; and x0 comes out."""
    found = findings["families"][family]["fed"]
    assert len(found) == 2 * (4 + 4 + 1)
    for name, case in found.items():
        assert case["calls"] == case["steps"]
        assert case["first"] == pytest.approx(case["expected first"], abs=1e-5), name
        assert case["wrong"] <= 0.02, name  # of 32,768 numbers and more
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
    the same; the stock loader finds a place for every key, and the picture changes; the MODEL stays as it was."""
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
    assert found["unchanged"]


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


def test_a_full_lcm_keeps_its_guidance_through_the_hosts_own_nodes(findings: Any) -> None:
    """Loaded by the stock loader it is recognised, and guided once; saved by the stock node it is the same model."""
    found = dict(findings["guidance"])
    for info in (found.pop("stock info"), found.pop("scale")):
        assert "; full LCM (SD 1.x" in info
    assert len(found) == 7
    for name, difference in found.items():
        assert difference <= 1e-3, name  # latents in the host's scale


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
    misreads, and a latent of 16 x 16 pixels, are explained."""
    found = findings["stock_nodes"]
    assert found["listed lcm_suite"]
    assert found["listed tcd_suite"]
    assert max(found["lcm_suite"], found["tcd_suite"]) <= 5e-4
    wrong = found["kind"] == "V_PREDICTION"
    assert ("predicts v, but ModelSamplingDiscrete (lcm)" in found["behind the stock node"]) == wrong
    assert "16x16 pixels, is too small for this MODEL" in found["too small"]


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
