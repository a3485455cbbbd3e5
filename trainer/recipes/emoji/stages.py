"""The stages of the recipe: what each trains, from what, how long and with which settings.

Every stage leaves its result in the work folder and is skipped when that is there; a stage that was stopped half-way
continues at its last saved step. So the same command always goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.files.atomic import new_folder
from lcm_core.files.safetensors import read_safetensors, write_safetensors
from trainer.config import LoopConfig
from trainer.methods.config import Dmd2Config, LcdConfig
from trainer.recipes.emoji import AnyModule
from trainer.recipes.emoji.autoencoder import train_tiny_vae, train_vae
from trainer.recipes.emoji.data import STYLE_HELD_OUT, Drawings
from trainer.recipes.emoji.features import FeatureNetwork, load_features, save_features, train_features
from trainer.recipes.emoji.latents import CaptionedLatents, encode_pool
from trainer.recipes.emoji.plan import plan_loop
from trainer.recipes.emoji.student import average, distil_full, distil_lora, merged
from trainer.recipes.emoji.style import train_style
from trainer.recipes.emoji.teacher import train_teacher

STAGES = {
    "features": LoopConfig(steps=4000, batch_size=64, learning_rate=2e-3),
    "vae": LoopConfig(steps=60000, batch_size=8, learning_rate=8e-4, ema_decay=0.998),
    "teacher": LoopConfig(
        steps=76000,
        batch_size=64,
        learning_rate=6e-4,
        warmup_steps=2400,
        cooldown=0.45,
        adam_beta2=0.99,
        max_grad_norm=0.5,
        ema_decay=0.9999,
        save_every=300.0,
    ),
    "tiny": LoopConfig(steps=8000, batch_size=8, learning_rate=1e-3, ema_decay=0.998),
    "lcm": LoopConfig(steps=16000, batch_size=32, learning_rate=3e-4, cooldown=0.6, ema_decay=0.95),
    "lora": LoopConfig(steps=7400, batch_size=32, learning_rate=1e-3, cooldown=0.6, ema_decay=0.95),
    "lora_dmd2": LoopConfig(
        steps=700,
        batch_size=16,
        learning_rate=4e-4,
        warmup_steps=20,
        lr_schedule="constant",
        adam_beta2=0.99,
        ema_decay=0.99,
    ),
    "lcm_dmd2": LoopConfig(
        steps=1200,
        batch_size=16,
        learning_rate=1e-4,
        warmup_steps=30,
        cooldown=0.6,
        adam_beta2=0.99,
        ema_decay=0.98,
    ),
    "style": LoopConfig(steps=1400, batch_size=16, learning_rate=1e-3, cooldown=0.5, ema_decay=0.99),
}
"""Each training stage's loop. The teacher's batch is of the smallest pictures; larger ones come in smaller batches."""
DISTILLATION = LcdConfig(w_min=0.0, w_max=3.0)
"""Guidance that suits the small teacher; Stable Diffusion wants 2 to 14."""
LORA_DISTILLATION = replace(DISTILLATION, w_min=1.0, w_max=1.0)
MATCHING = Dmd2Config(w_min=0.0, w_max=3.0, critic_updates=2, consistency_share=0.3)
LORA_MATCHING = Dmd2Config(w_min=1.0, w_max=1.0, critic_updates=2, gan_weight=0.01)
MATCHED_SHARE = 0.5
"""Share of a student after distribution matching in the average with what it was before."""
START_SHARE, LORA_SHARE = 0.6, 0.5
"""Share of the LCM-LoRA's weights in those of the full LCM: before distribution matching, and in the result."""
LORA_RANK = 8
LORA_FILE = "lora/lcm_lora.safetensors"
STYLE_FILE = f"lora/{STYLE_HELD_OUT}_style.safetensors"


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
    workers: int = 0
    """Processes that prepare batches while a GPU computes."""

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


def get_vae(recipe: Recipe) -> AnyModule:
    from diffusers import AutoencoderKL

    def make(folder: Path) -> Mapping[str, AnyModule]:
        config, workers = recipe.options.loop("vae"), recipe.options.workers
        return {"vae": train_vae(recipe.drawings, config, folder, recipe.device, workers)}

    return _cached(recipe, "vae", {"vae": AutoencoderKL}, make)["vae"]


def get_tiny_vae(recipe: Recipe, vae: AnyModule) -> AnyModule:
    from diffusers import AutoencoderTiny

    def make(folder: Path) -> Mapping[str, AnyModule]:
        config, workers = recipe.options.loop("tiny"), recipe.options.workers
        return {"vae": train_tiny_vae(vae, recipe.drawings, config, folder, recipe.device, workers)}

    return _cached(recipe, "tiny", {"vae": AutoencoderTiny}, make)["vae"]


def get_latents(recipe: Recipe, vae: AnyModule) -> CaptionedLatents:
    """The VAE's latents of all drawings that are not held out, and of scenes made from them, in several sizes."""
    options = recipe.options
    seen, folder = recipe.drawings.indices(held_out=False), recipe.folder("latents")
    return encode_pool(
        vae, recipe.drawings, seen, recipe.tokenizer, folder, recipe.device, options.effort, options.workers
    )


def get_teacher(recipe: Recipe, data: CaptionedLatents) -> dict[str, AnyModule]:
    """U-Net ("unet") and text encoder ("text_encoder")."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    def make(folder: Path) -> Mapping[str, AnyModule]:
        return train_teacher(data, recipe.options.loop("teacher"), folder, recipe.device, recipe.options.workers)

    return _cached(recipe, "teacher", {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}, make)


def get_lcm(
    recipe: Recipe, data: CaptionedLatents, teacher: Mapping[str, AnyModule], lora: Mapping[str, Tensor]
) -> AnyModule:
    """The full LCM: consistency distillation, then distribution matching; the average of both and the LCM-LoRA."""
    from diffusers import UNet2DConditionModel

    def make(folder: Path) -> Mapping[str, AnyModule]:
        config = recipe.options.loop("lcm")
        return {"unet": distil_full(data, teacher, DISTILLATION, config, folder, recipe.device)}

    def match(folder: Path) -> Mapping[str, AnyModule]:
        config = recipe.options.loop("lcm_dmd2")
        start = replace(other, tensors=average(first.state_dict(), other.tensors, START_SHARE))
        return {"unet": distil_full(data, teacher, MATCHING, config, folder, recipe.device, start)}

    other = merged(teacher["unet"], lora)
    first = _cached(recipe, "lcm", {"unet": UNet2DConditionModel}, make)["unet"]
    second = _cached(recipe, "lcm_dmd2", {"unet": UNet2DConditionModel}, match)["unet"]
    own = average(first.state_dict(), second.state_dict(), MATCHED_SHARE)
    first.load_state_dict(average(own, other.tensors, LORA_SHARE))
    return first


def get_lora(recipe: Recipe, data: CaptionedLatents, teacher: Mapping[str, AnyModule]) -> dict[str, Tensor]:
    """The LCM-LoRA's tensors in kohya's layout: the average of consistency distillation and distribution matching."""

    def make(folder: Path) -> dict[str, Tensor]:
        config = recipe.options.loop("lora")
        return distil_lora(data, teacher, LORA_DISTILLATION, config, LORA_RANK, folder, recipe.device)

    def match(folder: Path) -> dict[str, Tensor]:
        config = recipe.options.loop("lora_dmd2")
        return distil_lora(data, teacher, LORA_MATCHING, config, LORA_RANK, folder, recipe.device, first)

    first = _cached_lora(recipe, "lora", make)
    return average(first, _cached_lora(recipe, "lora_dmd2", match), MATCHED_SHARE)


def get_style(recipe: Recipe, vae: AnyModule, teacher: Mapping[str, AnyModule]) -> dict[str, Tensor]:
    """The style LoRA's tensors in kohya's layout."""

    def make(folder: Path) -> dict[str, Tensor]:
        drawings, config = recipe.drawings, recipe.options.loop("style")
        chosen = torch.tensor([i for i, e in enumerate(drawings.entries) if e.style == STYLE_HELD_OUT])
        data = encode_pool(vae, drawings, chosen, recipe.tokenizer, folder / "latents", recipe.device, effort=0)
        return train_style(data, teacher, config, LORA_RANK, folder, recipe.device, recipe.options.workers)

    return _cached_lora(recipe, "style", make)


def get_features(recipe: Recipe) -> FeatureNetwork:
    """The benchmark's feature network, rounded to half precision as everybody else will have it."""
    folder = recipe.folder("features")
    path = folder / "features.safetensors"
    if not path.exists():
        torch.manual_seed(0)  # the network's first weights
        config, workers = recipe.options.loop("features"), recipe.options.workers
        save_features(path, train_features(recipe.drawings, config, folder, recipe.device, workers))
    return load_features(path)


def _cached(
    recipe: Recipe,
    stage: str,
    classes: dict[str, Any],
    make: Callable[[Path], Mapping[str, AnyModule]],
) -> dict[str, AnyModule]:
    """The stage's networks from its folder; trained and stored there first where they are not."""
    result = recipe.folder(stage) / "result"
    if not result.exists():
        torch.manual_seed(0)  # the networks' first weights
        networks = make(recipe.folder(stage))
        with new_folder(result) as temporary:
            for name in classes:
                networks[name].save_pretrained(temporary / name)
    return {name: cls.from_pretrained(result / name).to(recipe.device).eval() for name, cls in classes.items()}


def _cached_lora(recipe: Recipe, stage: str, make: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The stage's LoRA from its folder; trained and stored there first where it is not."""
    path = recipe.folder(stage) / "result.safetensors"
    if not path.exists():
        torch.manual_seed(0)  # the adapters' first weights
        write_safetensors(path, make(path.parent))
    return read_safetensors(path)[0]
