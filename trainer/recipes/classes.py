"""`python -m trainer recipe classes`: a small class-conditional teacher, which paints by the group of emoji.

It learns from the latents of the drawings that come with the embedded model, and shares that model's VAE. The result is
a diffusers folder that `distill` and `python -m lcm_core generate --class animals` take. Stopped at any moment, the
same command goes on where it was.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.families.labels import INDEX
from lcm_core.files.atomic import new_folder
from lcm_core.files.checkpoint import Component, ModelInfo, read_component, save_component, scheduler_config
from lcm_core.files.recommended import Recommended
from lcm_core.files.safetensors import write_json
from lcm_core.networks.device import choose_device
from lcm_core.pipeline.sources import find_source
from trainer.config import LoopConfig
from trainer.loop import step_generator, train
from trainer.recipes.emoji.compute import place
from trainer.recipes.emoji.data import GROUPS, load_entries, load_shipped
from trainer.recipes.emoji.teacher import CAPTION_DROPOUT, PREDICTION_TYPE, NoisedBatch, add_noise, diffusion_loss

CLASSES = tuple(GROUPS.values())
"""Names of the labels, by number; the number behind the last stands for no label."""
LOOP = LoopConfig(steps=3000, batch_size=32, learning_rate=2e-3, ema_decay=0.998)
GUIDANCE = 2.0
"""The guidance scale that the teacher is used with."""


@dataclass(frozen=True)
class Options:
    work: Path
    """Folder of the state."""
    output: Path
    """Folder of the finished model."""
    device: str = "cpu"
    """Where to train: cpu, cuda, mps."""
    effort: float = 1.0
    """Multiplies the steps."""


def run(options: Options) -> None:
    """Train the teacher and write its diffusers folder, unless that is there."""
    if not options.output.exists():
        torch.manual_seed(0)  # the first weights
        steps = max(1, round(LOOP.steps * options.effort))
        unet = train_teacher(replace(LOOP, steps=steps), options.work / "teacher", choose_device(options.device))
        with new_folder(options.output) as folder:
            write_model(folder, unet)
    print(f"{options.output}: classes {', '.join(CLASSES)}")
    print(f"python -m trainer distill --teacher {options.output} --data emoji --student full")


def build_unet(side: int) -> Any:
    """An untrained U-Net for latents of this side whose label is added to its timestep."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        num_class_embeds=len(CLASSES) + 1,
    )


def train_teacher(config: LoopConfig, folder: Path, device: torch.device) -> Any:
    """Train the U-Net to predict v, a share of the labels dropped. Returns its moving average."""
    latents, _ = load_shipped()
    labels = torch.tensor([CLASSES.index(entry.group) for entry in load_entries()])
    unet = place(build_unet(latents.shape[-1]), device)
    average = copy.deepcopy(unet).requires_grad_(False)

    def draw(step: int) -> NoisedBatch:
        generator = step_generator(config.seed, step)
        chosen = torch.randint(len(latents), (config.batch_size,), generator=generator)
        dropped = torch.rand(config.batch_size, generator=generator) < CAPTION_DROPOUT
        return add_noise(latents[chosen], labels[chosen].masked_fill(dropped, len(CLASSES)), generator)

    def predict(x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        output: Tensor = unet(x_t, t, label, return_dict=False)[0]
        return output

    train(unet, lambda step, _: diffusion_loss(predict, draw(step), device), config, folder, average)
    return average


def write_model(folder: Path, unet: Any) -> None:
    """A diffusers folder: U-Net, the embedded model's VAE, schedule, and the names of the labels."""
    source = find_source("emoji", "teacher")
    weights = {name: tensor.detach().half() for name, tensor in unet.state_dict().items()}
    config = {"_class_name": "UNet2DModel", **{k: v for k, v in unet.config.items() if not k.startswith("_")}}
    save_component(folder / "unet", Component(weights, config, str(folder)))
    save_component(folder / "vae", read_component(source.vae, "vae"))
    info = ModelInfo(source.info.family, PREDICTION_TYPE)
    said = Recommended(sampler="euler", teacher_steps=25, teacher_guidance_scale=GUIDANCE)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(info, said))
    write_json(folder / INDEX, {"id2label": {str(number): name for number, name in enumerate(CLASSES)}})
