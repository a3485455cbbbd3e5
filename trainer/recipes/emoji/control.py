"""A small T2I-Adapter (arXiv 2302.08453) for the embedded model: outlines that guide what it paints.

    python -m trainer.recipes.emoji.control

It learns from pictures that the model itself paints, so it needs no data set and can be made again, in minutes on a
CPU, whenever the model's weights change. Features are added once to the U-Net's way down and do not depend on the
timestep, so what was learnt on the teacher serves the LCM and the LCM-LoRA too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lcm_core.files.safetensors import write_safetensors
from lcm_core.pipeline import PictureOptions, Pipeline
from lcm_core.pipeline.generate import Inputs, noise_source, paint
from lcm_core.pipeline.model import load_model
from lcm_core.pipeline.prompts import encode_prompts
from lcm_core.pipeline.sources import MODELS

LOW, HIGH = 0.2, 0.4  # thresholds of the outlines, as in the example workflow
STYLES = ("noto", "fluent", "twemoji")
THINGS = """
red apple, green apple, lemon, banana, strawberry, tomato, eggplant, carrot, corn, mushroom, bread, croissant,
cheese, hamburger, pizza, hot dog, sandwich, taco, cooked rice, sushi, ice cream, doughnut, cookie, birthday
cake, chocolate, candy, hot beverage, wine glass, beer mug, fork and knife, cat face, dog face, mouse face,
rabbit face, fox, bear, panda, koala, tiger face, lion, cow face, pig face, frog, monkey face, chicken,
penguin, bird, duck, owl, bee, butterfly, snail, lady beetle, turtle, snake, octopus, fish, dolphin, whale,
crocodile, elephant, horse, cactus, evergreen tree, palm tree, four leaf clover, tulip, rose, sunflower,
blossom, house, castle, tent, church, ferris wheel, locomotive, bus, taxi, automobile, bicycle, sailboat,
airplane, rocket, helicopter, hot air balloon, umbrella, snowman, star, rainbow, sun, crescent moon, cloud,
fire, droplet, soccer ball, basketball, trophy, guitar, violin, camera, telephone, light bulb, book, pencil,
scissors, key, hammer, bell, crown, top hat, gem stone, grinning face, smiling face with sunglasses, crying
face, angry face, ghost, robot, alien, skull
"""


def outlines(images: Tensor) -> Tensor:
    """Edges (B, 1, H, W), 0 or 1, of pictures (B, 3, H, W) in [-1, 1], found as ComfyUI's Canny node finds them."""
    from kornia.filters import canny

    return canny((images + 1) / 2, LOW, HIGH)[1]


class Examples:
    """Pictures that the model painted itself: latents, outlines and prompts."""

    def __init__(self, pipe: Pipeline, seeds: int, batch: int = 32) -> None:
        model = pipe.model
        names = [" ".join(name.split()) for name in THINGS.split(",")]
        prompts = [f"{name}, {style} style" for name in names for style in STYLES] * seeds
        settings = pipe.resolve(PictureOptions())
        self.size = size = settings.width, settings.height
        self.latents, self.edges, self.context = [], [], []
        for start in range(0, len(prompts), batch):
            words = prompts[start : start + batch]
            cond = model.encode(words, *size)
            noise = noise_source(range(start, start + len(words)), model.device)
            images = paint(model, Inputs(encode_prompts(model, words, size, "plain"), None, noise), settings)
            self.latents.append(model.vae.encode(images))
            self.edges.append(outlines(images))
            self.context.append(cond["encoder_hidden_states"])
        self.x0, self.hints, self.words = map(torch.cat, (self.latents, self.edges, self.context))

    def draw(self, count: int, null: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, outlines and prompts; of these every other one is empty, so that the outlines must tell."""
        chosen = torch.randint(len(self.x0), (count,), generator=generator)
        words = self.words[chosen].clone()
        words[::2] = null
        return self.x0[chosen], self.hints[chosen], words


def build_adapter(channels: list[int]) -> Any:
    """An untrained adapter for a U-Net of these widths, in the shape that hosts know."""
    from diffusers import T2IAdapter

    return T2IAdapter(1, list(channels), num_res_blocks=2, downscale_factor=8, adapter_type="full_adapter")


def loss_of(model: Any, adapter: Any, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """The teacher's own loss with the adapter's features; without an adapter, of the teacher alone."""
    x0, hints, words = batch
    # early steps decide about shapes: cubic sampling, arXiv 2302.08453 Eq. 6
    last = model.diffusion.process.num_train_timesteps - 1
    t = ((1 - torch.rand(len(x0), generator=generator) ** 3) * last).round().long()
    eps = torch.randn(x0.shape, generator=generator)
    features = None if adapter is None else adapter(hints)
    output = model.unet.model(
        model.diffusion.noise(x0, eps, t), t, words, down_intrablock_additional_residuals=features, return_dict=False
    )[0]
    return functional.mse_loss(output, model.diffusion.target(x0, eps, t))


def train(steps: int, batch: int, learning_rate: float, seeds: int, seed: int = 0) -> dict[str, Tensor]:
    """Paint examples, train, and say what the outlines are worth. Returns the adapter's weights, float16."""
    from tqdm import trange

    torch.manual_seed(seed)
    examples = Examples(Pipeline(load_model("emoji", device="cpu")), seeds)
    teacher = load_model("emoji", device="cpu", unet="teacher")
    teacher.unet.model.requires_grad_(False)
    null = teacher.encode([""], *examples.size)["encoder_hidden_states"]
    adapter = build_adapter(teacher.unet.model.config.block_out_channels)
    optimiser = torch.optim.AdamW(adapter.parameters(), learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for step in (bar := trange(steps, desc="adapter", unit="step")):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 50) * (1 - step / steps)
        loss = loss_of(teacher, adapter, examples.draw(batch, null, generator), generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        sample = examples.draw(256, null, generator)
        without, guided = (
            loss_of(teacher, network, sample, torch.Generator().manual_seed(1)).item() for network in (None, adapter)
        )
    print(f"loss without outlines {without:.4f}, with {guided:.4f}")
    return {name: weight.half() for name, weight in adapter.state_dict().items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model's T2I-Adapter for outlines.")
    parser.add_argument("--output", type=Path, default=MODELS / "emoji" / "control" / "emoji_canny.safetensors")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3, help="pictures painted of each prompt")
    args = parser.parse_args()
    write_safetensors(args.output, train(args.steps, args.batch, args.learning_rate, args.seeds))
    print(args.output)


if __name__ == "__main__":
    main()
