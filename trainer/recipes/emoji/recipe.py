"""`python -m trainer recipe emoji`: from the icon packages to the embedded model's weights, one stage after another.

Every stage leaves its result in the work folder and is skipped when that is there; a stage that was stopped half-way
continues at its last saved step. So the same command always goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from lcm_core.files.atomic import new_folder
from trainer.recipes.emoji.data import SHIPPED
from trainer.recipes.emoji.icons import load_drawings
from trainer.recipes.emoji.publish import assemble, finish, get_first_table, get_table, load_models, ship_benchmark
from trainer.recipes.emoji.stages import (
    LORA_FILE,
    STYLE_FILE,
    Options,
    Recipe,
    get_latents,
    get_lcm,
    get_lora,
    get_style,
    get_teacher,
    get_tiny_vae,
    get_vae,
)
from trainer.recipes.emoji.words import build_tokenizer
from trainer.report.tables import to_markdown

__all__ = ["Options", "run"]


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
    lora = get_lora(recipe, data, teacher)
    networks = {
        "vae": vae,
        "text_encoder": teacher["text_encoder"],
        "unet_teacher": teacher["unet"],
        "unet_lcm": get_lcm(recipe, data, teacher, lora),
        "vae_tiny": get_tiny_vae(recipe, vae),
    }
    loras = {LORA_FILE: lora, STYLE_FILE: get_style(recipe, vae, teacher)}
    if not options.output.exists():
        with new_folder(options.output) as folder:
            assemble(recipe, folder, networks, loras)
            ship_benchmark(recipe, folder / SHIPPED.name, data)
    models = load_models(recipe, options.output)
    rows = get_table(recipe, options.output, models)
    finish(recipe, options.output, rows, get_first_table(recipe, options.output, models, rows))
    print(to_markdown([asdict(row) for row in rows]))
