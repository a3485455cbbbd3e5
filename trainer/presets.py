"""Presets of `distill`: settings that suit a family of teachers. They say only what differs from the defaults."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]
"""Values of a configuration, by section and name."""

_LORA: Values = {
    "method": {"w_min": 7.5, "w_max": 7.5},  # of arXiv 2311.05556; a LoRA does not read w
    "student": {"kind": "lora", "rank": 64},
    "training": {"steps": 2000, "batch_size": 16, "learning_rate": 1e-4, "ema_decay": 0.95},
}
_FULL: Values = {
    "method": {"w_min": 2.0, "w_max": 14.0},
    "student": {"kind": "full", "gradient_checkpointing": True},
    "training": {"steps": 10_000, "batch_size": 32, "learning_rate": 8e-6, "ema_decay": 0.999, "accumulation": 2},
}

PRESETS: dict[str, tuple[str, Values]] = {
    "emoji": (
        "the embedded model: some ten minutes on a CPU, to see how everything works",
        {
            "teacher": "emoji",
            "output": "runs/emoji-lora",
            "data": {"path": "emoji"},
            "method": {"w_min": 1.0, "w_max": 1.0},
            "student": {"kind": "lora", "rank": 16},
            "training": {
                "steps": 150,
                "batch_size": 8,
                "learning_rate": 1e-3,
                "warmup_steps": 10,
                "cooldown": 0.5,
                "ema_decay": 0.95,
                "save_every": 30.0,
            },
            "report": {"preview_every": 50, "samples": 256},
        },
    ),
    "sd15-lora": ("LCM-LoRA for Stable Diffusion 1.x", _LORA),
    "sd15-full": ("full LCM of Stable Diffusion 1.x", _FULL),
    "sd21-lora": ("LCM-LoRA for Stable Diffusion 2.x, epsilon or v-prediction", _LORA),
    "sdxl-lora": (
        "LCM-LoRA for SDXL",
        {
            **_LORA,
            "student": {"kind": "lora", "rank": 64, "gradient_checkpointing": True},
            "training": {**_LORA["training"], "accumulation": 4},
        },
    ),
    "sdxl-full": (
        "full LCM of SDXL",
        {**_FULL, "training": {**_FULL["training"], "accumulation": 8, "learning_rate": 5e-6}},
    ),
}
"""Name -> (what it is for, settings as in a configuration file)."""
