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
from trainer.recipes.emoji.autoencoder import SCALING_FACTOR, encode_mean, train_vae
from trainer.recipes.emoji.benchmark import load_benchmark
from trainer.recipes.emoji.card import model_card
from trainer.recipes.emoji.data import SHIPPED, Drawings, load_drawings, save_shipped
from trainer.recipes.emoji.features import extract, load_features, save_features, train_features
from trainer.recipes.emoji.ledger import Ledger, Row
from trainer.recipes.emoji.student import distil_full, distil_lora
from trainer.recipes.emoji.teacher import PREDICTION_TYPE, CaptionedLatents, train_teacher
from trainer.recipes.emoji.words import build_tokenizer
from trainer.report.tables import to_markdown

STAGES = {
    "features": LoopConfig(steps=2400, batch_size=64, learning_rate=2e-3),
    "vae": LoopConfig(steps=6500, batch_size=16, learning_rate=1e-3, ema_decay=0.998),
    "teacher": LoopConfig(steps=9700, batch_size=64, learning_rate=7e-4),
    "lcm": LoopConfig(steps=2000, batch_size=32, learning_rate=2e-4, ema_decay=0.95),
    "lora": LoopConfig(steps=400, batch_size=32, learning_rate=1e-3, ema_decay=0.95),
}
"""Each training stage's loop. The numbers are those of the shipped weights."""
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
    size: int = 64
    """Pictures' width and height in pixels, 64 or 128."""
    icons: Path | None = None
    """`node_modules` with the icon packages; fetched with npm where not given."""
    device: str = "cpu"
    """Where to train: cpu, cuda, mps."""
    effort: float = 1.0
    """Multiplies every stage's steps: more where a GPU is at hand, less for a trial."""
    samples: int = 2048
    """Pictures behind each line of the table."""

    def loop(self, stage: str) -> LoopConfig:
        config = STAGES[stage]
        return replace(config, steps=max(1, round(config.steps * self.effort)))


@dataclass(frozen=True)
class Workshop:
    """What all stages share."""

    options: Options
    device: torch.device
    drawings: Drawings
    tokenizer: Any

    def folder(self, stage: str) -> Path:
        return self.options.work / f"{stage}-{self.options.size}"


def run(options: Options) -> None:
    """All stages, in order.

    Raises:
        InputError: a stage cannot be run; what was reached before stays.
    """
    drawings = load_drawings(options.work / "data", options.size, options.icons)
    tokenizer = build_tokenizer(drawings, options.work / "tokenizer")
    shop = Workshop(options, torch.device(options.device), drawings, tokenizer)
    vae = get_vae(shop)
    teacher = get_teacher(shop, vae)
    lcm, lora = get_lcm(shop, vae, teacher), get_lora(shop, vae, teacher)
    if not options.output.exists():
        with new_folder(options.output) as folder:
            assemble(shop, folder, vae, teacher, lcm, lora)
            ship_benchmark(shop, folder / SHIPPED.name, vae)
    rows = get_table(shop, options.output)
    finish(shop, options.output, rows)
    print(to_markdown([asdict(row) for row in rows]))


def get_vae(shop: Workshop) -> Network:
    from diffusers import AutoencoderKL

    def make(folder: Path) -> Mapping[str, Network]:
        return {"vae": train_vae(shop.drawings, shop.options.loop("vae"), folder, shop.device)}

    return _cached(shop, "vae", {"vae": AutoencoderKL}, make)["vae"]


def get_latents(shop: Workshop, vae: Network) -> CaptionedLatents:
    """The VAE's latents of all drawings that are not held out, (N, 4, S/8, S/8), scaled to spread 1."""
    path, seen = shop.folder("vae") / "latents.safetensors", shop.drawings.indices(held_out=False)
    if not path.exists():
        parts = [encode_mean(vae, images, shop.device).cpu() for images in shop.drawings.images[seen].split(64)]
        write_safetensors(path, {"latents": torch.cat(parts) * SCALING_FACTOR}, {})
    return CaptionedLatents(read_safetensors(path)[0]["latents"], shop.drawings, seen, shop.tokenizer)


def get_teacher(shop: Workshop, vae: Network) -> dict[str, Network]:
    """U-Net ("unet") and text encoder ("text_encoder")."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    def make(folder: Path) -> Mapping[str, Network]:
        return train_teacher(get_latents(shop, vae), shop.options.loop("teacher"), folder, shop.device)

    return _cached(shop, "teacher", {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}, make)


def get_lcm(shop: Workshop, vae: Network, teacher: Mapping[str, Network]) -> Network:
    from diffusers import UNet2DConditionModel

    def make(folder: Path) -> Mapping[str, Network]:
        data, config = get_latents(shop, vae), shop.options.loop("lcm")
        return {"unet": distil_full(data, teacher, DISTILLATION, config, folder, shop.device)}

    return _cached(shop, "lcm", {"unet": UNet2DConditionModel}, make)["unet"]


def get_lora(shop: Workshop, vae: Network, teacher: Mapping[str, Network]) -> dict[str, Tensor]:
    """The LCM-LoRA's tensors in kohya's layout."""
    path = shop.folder("lora") / "lcm_lora.safetensors"
    if not path.exists():
        data, config = get_latents(shop, vae), shop.options.loop("lora")
        torch.manual_seed(0)  # the adapters' first weights
        tensors = distil_lora(data, teacher, LORA_DISTILLATION, config, LORA_RANK, path.parent, shop.device)
        write_safetensors(path, tensors)
    return read_safetensors(path)[0]


def ship_benchmark(shop: Workshop, folder: Path, vae: Network) -> None:
    """Put the feature network and what it sees in the drawings beside the model."""
    torch.manual_seed(0)  # the network's first weights
    network = train_features(shop.drawings, shop.options.loop("features"), shop.folder("features"), shop.device)
    folder.mkdir()
    save_features(folder / "features.safetensors", network)
    network = load_features(folder / "features.safetensors")  # as everybody else will have it, rounded
    real = extract(network, shop.drawings.images)
    save_shipped(folder, shop.drawings.entries, get_latents(shop, vae).latents, real)


def get_table(shop: Workshop, folder: Path) -> list[Row]:
    """Every line of the table, from the finished model's files; each is measured once and kept in the work folder."""
    models = {
        "teacher": load_model(folder, shop.device, unet="teacher"),
        "LCM": load_model(folder, shop.device, unet="lcm"),
        "LCM-LoRA": load_model(folder, shop.device, unet="teacher", lora=[(folder / LORA_FILE, 1.0)]),
    }
    work, size = shop.options.work, shop.options.size
    shipped, samples = folder / SHIPPED.name, shop.options.samples
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
    shop: Workshop,
    stage: str,
    classes: dict[str, Any],
    make: Callable[[Path], Mapping[str, Network]],
) -> dict[str, Network]:
    """The stage's networks from its folder; trained and stored there first where they are not."""
    result = shop.folder(stage) / "result"
    if not result.exists():
        torch.manual_seed(0)  # the networks' first weights
        networks = make(shop.folder(stage))
        with new_folder(result) as temporary:
            for name in classes:
                networks[name].save_pretrained(temporary / name)
    return {name: cls.from_pretrained(result / name).to(shop.device).eval() for name, cls in classes.items()}


def assemble(
    shop: Workshop, folder: Path, vae: Network, teacher: Mapping[str, Network], lcm: Network, lora: dict[str, Tensor]
) -> None:
    """Write the model, in half precision, as a folder that `lcm_core` loads."""
    networks = {"vae": vae, "text_encoder": teacher["text_encoder"], "unet_teacher": teacher["unet"], "unet_lcm": lcm}
    for name, network in networks.items():
        copy.deepcopy(network).half().save_pretrained(folder / name)
        config = read_json(folder / name / "config.json")
        config.pop("_name_or_path", None)  # the work folder on this machine
        write_json(folder / name / "config.json", config)
    shop.tokenizer.save_pretrained(folder / "tokenizer")
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(shop.options.work / "tokenizer" / file, folder / "tokenizer" / file)
    save_lora(folder / LORA_FILE, lora, "sd1")
    describe(shop, folder, guidance_scale=LORA_DISTILLATION.w_min + 1, teacher_guidance_scale=TEACHER_GUIDANCE[0])


def describe(shop: Workshop, folder: Path, guidance_scale: float, teacher_guidance_scale: float) -> None:
    """Write model.json: what the networks cannot say themselves, and what to use where the user says nothing."""
    settings = {
        "name": "emoji",
        "resolution": shop.options.size,
        "prediction_type": PREDICTION_TYPE,
        "schedule": {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        "original_steps": DISTILLATION.original_steps,
        "guidance_scale": guidance_scale,
        "teacher_guidance_scale": teacher_guidance_scale,
        "teacher_steps": 25,
    }
    with atomic_write(folder / "model.json") as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")


def finish(shop: Workshop, folder: Path, rows: list[Row]) -> None:
    """Set the best guidance as the default and write the model card."""
    teacher, student = (
        min((r for r in rows if (r.model, r.steps) == key), key=lambda r: r.fd) for key in (("teacher", 25), ("LCM", 4))
    )
    describe(shop, folder, student.guidance_scale, teacher.guidance_scale)
    card = model_card(shop.drawings, shop.options.size, _cost(shop), shop.options.device, rows)
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(card)


def _cost(shop: Workshop) -> dict[str, tuple[int, int, float]]:
    """Steps, batch size and seconds of each trained stage."""
    cost = {}
    for stage in STAGES:
        config = shop.options.loop(stage)
        metadata = read_safetensors(shop.folder(stage) / "state.safetensors")[1]
        cost[stage] = config.steps, config.batch_size, float(metadata["seconds"])
    return cost
