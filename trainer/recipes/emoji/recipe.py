"""`python -m trainer recipe emoji`: from the icon packages to the embedded model's weights, one stage after another.

Every stage leaves its result in the work folder and is skipped when that is there; a stage that was stopped half-way
continues at its last saved step. So the same command always goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.files.atomic import atomic_write, new_folder
from lcm_core.files.lora import save_lora
from lcm_core.files.safetensors import read_json, read_safetensors, write_json, write_safetensors
from lcm_core.pipeline.model import load_model
from trainer.config import LoopConfig
from trainer.methods.config import LcdConfig
from trainer.recipes.emoji import Network
from trainer.recipes.emoji.autoencoder import train_vae
from trainer.recipes.emoji.benchmark import load_benchmark
from trainer.recipes.emoji.card import model_card
from trainer.recipes.emoji.data import SHIPPED, Drawings, save_shipped
from trainer.recipes.emoji.features import extract, load_features, save_features, train_features
from trainer.recipes.emoji.icons import load_drawings
from trainer.recipes.emoji.latents import CaptionedLatents, encode_pool
from trainer.recipes.emoji.ledger import Ledger, Row
from trainer.recipes.emoji.plan import plan_loop
from trainer.recipes.emoji.student import distil_full, distil_lora
from trainer.recipes.emoji.teacher import PREDICTION_TYPE, train_teacher
from trainer.recipes.emoji.words import build_tokenizer
from trainer.report.tables import to_markdown

STAGES = {
    "features": LoopConfig(steps=4000, batch_size=64, learning_rate=2e-3),
    "vae": LoopConfig(steps=60000, batch_size=8, learning_rate=8e-4, ema_decay=0.998),
    "teacher": LoopConfig(steps=70000, batch_size=64, learning_rate=7e-4, save_every=300.0),
    "lcm": LoopConfig(steps=6000, batch_size=32, learning_rate=2e-4, ema_decay=0.95),
    "lora": LoopConfig(steps=1200, batch_size=32, learning_rate=1e-3, ema_decay=0.95),
}
"""Each training stage's loop. The teacher's batch is of the smallest pictures; larger ones come in smaller batches."""
DISTILLATION = LcdConfig(w_min=0.0, w_max=3.0)
"""Guidance that suits the small teacher; Stable Diffusion wants 2 to 14."""
LORA_DISTILLATION = replace(DISTILLATION, w_min=1.0, w_max=1.0)
LORA_RANK = 8
LORA_FILE = "lora/lcm_lora.safetensors"
TEACHER_GUIDANCE = (1.5, 2.0, 3.0)
STUDENT_GUIDANCE = (1.0, 1.5, 2.0, 3.0)
"""Guidance scales that are tried; the one of lowest FD becomes the default."""
GUIDANCE_SAMPLES = 512
"""Pictures behind each trial of a guidance scale."""


@dataclass(frozen=True)
class Options:
    work: Path
    """Folder of everything between the icons and the weights."""
    output: Path
    """Folder of the finished model."""
    size: int = 128
    """Pictures' width and height in pixels."""
    icons: Path | None = None
    """`node_modules` with the icon packages; fetched with npm where not given."""
    device: str = "cpu"
    """Where to train: cpu, cuda, mps."""
    effort: float = 1.0
    """Multiplies every stage's steps and the number of scenes: more for a better model, less for a trial."""
    batch_scale: int = 1
    """Multiplies every stage's batches, and divides the steps that are left: 8 or so on a GPU."""
    samples: int = 2048
    """Pictures behind each line of the table."""

    def loop(self, stage: str) -> LoopConfig:
        """How the stage is trained, given what was done of it before."""
        config = STAGES[stage]
        config = replace(config, steps=max(1, round(config.steps * self.effort)))
        return plan_loop(self.folder(stage), config, self.batch_scale)

    def folder(self, stage: str) -> Path:
        """Where the stage keeps its state and its result."""
        return self.work / f"{stage}-{self.size}"


@dataclass(frozen=True)
class Recipe:
    """What all stages share."""

    options: Options
    device: torch.device
    drawings: Drawings
    tokenizer: Any

    def folder(self, stage: str) -> Path:
        return self.options.folder(stage)


def run(options: Options) -> None:
    """All stages, in order.

    Raises:
        InputError: a stage cannot be run; what was reached before stays.
    """
    drawings = load_drawings(options.work / "data", options.size, options.icons)
    tokenizer = build_tokenizer(drawings, options.work / "tokenizer")
    recipe = Recipe(options, torch.device(options.device), drawings, tokenizer)
    vae = get_vae(recipe)
    data = get_latents(recipe, vae)
    teacher = get_teacher(recipe, data)
    lcm, lora = get_lcm(recipe, data, teacher), get_lora(recipe, data, teacher)
    if not options.output.exists():
        with new_folder(options.output) as folder:
            assemble(recipe, folder, vae, teacher, lcm, lora)
            ship_benchmark(recipe, folder / SHIPPED.name, data)
    rows = get_table(recipe, options.output)
    finish(recipe, options.output, rows)
    print(to_markdown([asdict(row) for row in rows]))


def get_vae(recipe: Recipe) -> Network:
    from diffusers import AutoencoderKL

    def make(folder: Path) -> Mapping[str, Network]:
        return {"vae": train_vae(recipe.drawings, recipe.options.loop("vae"), folder, recipe.device)}

    return _cached(recipe, "vae", {"vae": AutoencoderKL}, make)["vae"]


def get_latents(recipe: Recipe, vae: Network) -> CaptionedLatents:
    """The VAE's latents of all drawings that are not held out, and of scenes made from them, in several sizes."""
    options = recipe.options
    return encode_pool(vae, recipe.drawings, recipe.tokenizer, recipe.folder("latents"), recipe.device, options.effort)


def get_teacher(recipe: Recipe, data: CaptionedLatents) -> dict[str, Network]:
    """U-Net ("unet") and text encoder ("text_encoder")."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    def make(folder: Path) -> Mapping[str, Network]:
        return train_teacher(data, recipe.options.loop("teacher"), folder, recipe.device)

    return _cached(recipe, "teacher", {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}, make)


def get_lcm(recipe: Recipe, data: CaptionedLatents, teacher: Mapping[str, Network]) -> Network:
    from diffusers import UNet2DConditionModel

    def make(folder: Path) -> Mapping[str, Network]:
        config = recipe.options.loop("lcm")
        return {"unet": distil_full(data, teacher, DISTILLATION, config, folder, recipe.device)}

    return _cached(recipe, "lcm", {"unet": UNet2DConditionModel}, make)["unet"]


def get_lora(recipe: Recipe, data: CaptionedLatents, teacher: Mapping[str, Network]) -> dict[str, Tensor]:
    """The LCM-LoRA's tensors in kohya's layout."""
    path = recipe.folder("lora") / "lcm_lora.safetensors"
    if not path.exists():
        config = recipe.options.loop("lora")
        torch.manual_seed(0)  # the adapters' first weights
        tensors = distil_lora(data, teacher, LORA_DISTILLATION, config, LORA_RANK, path.parent, recipe.device)
        write_safetensors(path, tensors)
    return read_safetensors(path)[0]


def ship_benchmark(recipe: Recipe, folder: Path, data: CaptionedLatents) -> None:
    """Put the feature network and what it sees in the core styles' drawings beside the model."""
    torch.manual_seed(0)  # the network's first weights
    network = train_features(recipe.drawings, recipe.options.loop("features"), recipe.folder("features"), recipe.device)
    folder.mkdir()
    save_features(folder / "features.safetensors", network)
    network = load_features(folder / "features.safetensors")  # as everybody else will have it, rounded
    entries = recipe.drawings.entries
    core = torch.tensor([i for i, e in enumerate(entries) if e.is_core])
    is_shipped = torch.tensor([entries[i].is_core for i in data.chosen.tolist()])
    latents = data.latents[data.largest][: len(is_shipped)][is_shipped]
    real = extract(network, recipe.drawings.on_white(core))
    save_shipped(folder, [entries[i] for i in core.tolist()], latents, real)


def get_table(recipe: Recipe, folder: Path) -> list[Row]:
    """Every line of the table, from the finished model's files; each is measured once and kept in the work folder."""
    models = {
        "teacher": load_model(folder, recipe.device, unet="teacher"),
        "LCM": load_model(folder, recipe.device, unet="lcm"),
        "LCM-LoRA": load_model(folder, recipe.device, unet="teacher", lora=[(folder / LORA_FILE, 1.0)]),
    }
    work, size = recipe.options.work, recipe.options.size
    shipped, samples = folder / SHIPPED.name, recipe.options.samples
    trial = Ledger(work / f"guidance-{size}.json", load_benchmark(min(GUIDANCE_SAMPLES, samples), shipped), models)
    guidance = min(TEACHER_GUIDANCE, key=lambda g: trial.row("teacher", "dpmpp_2m", 25, g).fd)
    student_guidance = min(STUDENT_GUIDANCE, key=lambda g: trial.row("LCM", "lcm", 4, g).fd)
    ledger = Ledger(work / f"table-{size}.json", load_benchmark(samples, shipped), models)
    for steps in (4, 1, 2, 8):
        ledger.row("LCM", "lcm", steps, student_guidance)
        ledger.row("teacher", "dpmpp_2m", steps, guidance)
        ledger.row("LCM-LoRA", "lcm", steps, 1.0)
    ledger.row("teacher", "dpmpp_2m", 25, guidance)
    for steps in (1, 2, 4, 8):
        ledger.row("teacher", "euler", steps, guidance)
    return sorted(ledger.rows, key=lambda row: (row.model, row.sampler, row.steps))


def _cached(
    recipe: Recipe,
    stage: str,
    classes: dict[str, Any],
    make: Callable[[Path], Mapping[str, Network]],
) -> dict[str, Network]:
    """The stage's networks from its folder; trained and stored there first where they are not."""
    result = recipe.folder(stage) / "result"
    if not result.exists():
        torch.manual_seed(0)  # the networks' first weights
        networks = make(recipe.folder(stage))
        with new_folder(result) as temporary:
            for name in classes:
                networks[name].save_pretrained(temporary / name)
    return {name: cls.from_pretrained(result / name).to(recipe.device).eval() for name, cls in classes.items()}


def assemble(
    recipe: Recipe, folder: Path, vae: Network, teacher: Mapping[str, Network], lcm: Network, lora: dict[str, Tensor]
) -> None:
    """Write the model, in half precision, as a folder that `lcm_core` loads."""
    networks = {"vae": vae, "text_encoder": teacher["text_encoder"], "unet_teacher": teacher["unet"], "unet_lcm": lcm}
    for name, network in networks.items():
        copy.deepcopy(network).half().save_pretrained(folder / name)
        config = read_json(folder / name / "config.json")
        config.pop("_name_or_path", None)  # the work folder on this machine
        write_json(folder / name / "config.json", config)
    recipe.tokenizer.save_pretrained(folder / "tokenizer")
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(recipe.options.work / "tokenizer" / file, folder / "tokenizer" / file)
    save_lora(folder / LORA_FILE, lora, "sd1")
    describe(recipe, folder, guidance_scale=LORA_DISTILLATION.w_min + 1, teacher_guidance_scale=TEACHER_GUIDANCE[0])


def describe(recipe: Recipe, folder: Path, guidance_scale: float, teacher_guidance_scale: float) -> None:
    """Write model.json: what the networks cannot say themselves, and what to use where the user says nothing."""
    settings = {
        "name": "emoji",
        "resolution": recipe.options.size,
        "prediction_type": PREDICTION_TYPE,
        "schedule": {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        "original_steps": DISTILLATION.original_steps,
        "guidance_scale": guidance_scale,
        "teacher_guidance_scale": teacher_guidance_scale,
        "teacher_steps": 25,
    }
    with atomic_write(folder / "model.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")


def finish(recipe: Recipe, folder: Path, rows: list[Row]) -> None:
    """Set the best guidance as the default and write the model card."""
    teacher, student = (
        min((r for r in rows if (r.model, r.steps) == key), key=lambda r: r.fd) for key in (("teacher", 25), ("LCM", 4))
    )
    describe(recipe, folder, student.guidance_scale, teacher.guidance_scale)
    card = model_card(recipe.drawings, recipe.options.size, _cost(recipe), recipe.options.device, rows)
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(card)


def _cost(recipe: Recipe) -> dict[str, tuple[int, int, float]]:
    """Steps, batch size and seconds of each trained stage."""
    cost = {}
    for stage in STAGES:
        config = recipe.options.loop(stage)
        metadata = read_safetensors(recipe.folder(stage) / "state.safetensors")[1]
        cost[stage] = config.steps, config.batch_size, float(metadata["seconds"])
    return cost
