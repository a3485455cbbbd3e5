"""The embedded model's card: what it is, what it was made from, what it cost, how good it is and where it fails."""

from __future__ import annotations

from dataclasses import asdict

from trainer.recipes.emoji.data import GROUPS, Drawings
from trainer.recipes.emoji.icons import SETS
from trainer.recipes.emoji.score_table import Row
from trainer.report.tables import to_markdown

KNOWN_FAULTS = (
    "- Faces, hearts, fruit, animals' heads and simple things are clear; what has many small parts (sailboats,",
    "  buildings, people, some food) is not, and of several things one may be missing.",
    "- The drawings themselves have an FD of 1.8, and 2.0 after the VAE: much room is left for longer training. The",
    "  teacher's loss was 0.339 at step 1,000, 0.292 at 2,000, 0.235 at 4,000, 0.198 at 6,000, 0.179 at 8,000 and",
    "  0.160 at its end.",
    "- The students are ahead of the teacher with one step alone, and get worse with more. The full LCM reads",
    "  guidance, but shows little of it: half of its weights are the LCM-LoRA's.",
    "- Held-out pairs are found half as often as seen ones, by the teacher as well: it knows many drawings by heart.",
    "  The measure asks for much: where each held-out drawing itself is left out of those to find, 11 % of them have",
    "  one of the same emoji as the nearest, and of as many seen ones 14 %.",
)
"""What is wrong with the weights that are shipped now."""
NAMES_CREDIT = "Names and keywords: emojibase-data, MIT License, from Unicode CLDR, Unicode License"


def model_card(
    drawings: Drawings,
    size: int,
    cost: dict[str, tuple[int, int, float]],
    device: str,
    rows: list[Row],
    first_rows: list[Row],
) -> str:
    """The model card, as Markdown.

    Args:
        cost: of each stage: steps, batch size, seconds.
        rows: the table.
        first_rows: lines measured with the first benchmark's feature network.
    """
    held_out = len(drawings.indices(held_out=True))
    lines = [
        "# Emoji: the embedded text-to-image model",
        "",
        f"Paints emoji-like pictures of {size}x{size} pixels from a few English words. It exists so that every",
        "command, test and benchmark of the suite has a real model at hand: a teacher (a small Stable Diffusion",
        "1.x), a full Latent Consistency Model and an LCM-LoRA distilled from it. It knows emoji and nothing else.",
        "Beside them lie a LoRA of one style that the teacher has not seen, a T2I-Adapter for outlines (`control/`,",
        "from `python -m trainer.recipes.emoji.control`), a tiny VAE for previews, and what the benchmark needs: its",
        "feature network, and the drawings' features, latents and names (`benchmark/`). The U-Nets and the VAE are",
        "stored in 8 bits, which their pictures do not show; `export` writes them as other programs read them.",
        "",
        "![24 prompts, each at 4 steps with seed 1](../../../docs/emoji.png)",
        "",
        "## Data",
        "",
        f"{len(drawings.entries)} drawings: Unicode's {', '.join(GROUPS.values())}",
        f'in {len(SETS)} styles, captioned with their names, keywords and style ("pizza, noto style").',
        f"{held_out} (emoji, style) pairs were held out of all generative training; the same emoji in the other styles",
        "were not.",
        "",
        *(f"- {style} style: {icons.credit} (package `{icons.package}`)" for style, icons in SETS.items()),
        f"- {NAMES_CREDIT}",
        "",
        "The weights are published under the licence of this repository; pictures painted with them may resemble the",
        "drawings, whose licences (with attribution for Twemoji and EmojiOne) apply to what is copied.",
        "",
        "## Training",
        "",
        f"`python -m trainer recipe emoji`, on {device}.",
        "",
        "| stage | steps | batch | minutes |",
        "|---|---|---|---|",
        *(f"| {name} | {steps} | {batch} | {seconds / 60:.1f} |" for name, (steps, batch, seconds) in cost.items()),
        "",
        "## Benchmark",
        "",
        "FD is the Frechet distance in the feature space of a small network trained on the real drawings alone; it is",
        "not Inception FID. Alignment: the share of pictures whose nearest real drawing shows the emoji asked for, in",
        "any style. Fixed seeds; the captions are the drawings' names with their style.",
        "",
        to_markdown([asdict(row) for row in rows]) if rows else "Not measured yet for these weights.\n",
        "In the features of the first benchmark, which sees 64 pixels:",
        "",
        to_markdown([asdict(row) for row in first_rows]) if first_rows else "Not measured yet for these weights.\n",
        "## Limits",
        "",
        *KNOWN_FAULTS,
        "- Small pictures, soft details; faces that differ in an eyebrow come out alike. No letters, flags or symbols.",
        "- Words outside the emoji vocabulary are read letter by letter and mean nothing to it.",
        "- It copies the drawings' styles; it was made for tests and teaching, not for artwork.",
    ]
    return "\n".join(lines) + "\n"
