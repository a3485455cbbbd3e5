"""How many steps a stage takes, when a part of them was done with other batches than the rest."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcm_core.files.safetensors import read_json, read_metadata, write_json
from trainer.config import LoopConfig


def plan_loop(folder: Path, config: LoopConfig, batch_scale: int) -> LoopConfig:
    """`config` with batches `batch_scale` times as large, and as many fewer steps of what is still to be done.

    A stage may begin on a CPU with small batches and end on a GPU with large ones, or the other way round: what was
    done counts as its share of the steps planned then. The plan is kept in the folder, so that the same command has
    the same. Larger batches keep the learning rate: at 1.4e-3, with batches of 512, the teacher's loss rose from 0.38
    to 1.0 at step 500 and stayed there.

    Args:
        folder: of the stage; with the state of what was done before, if there is any.
        config: of the whole stage, in batches of their own size.
    """
    state, path = folder / "state.safetensors", folder / "plan.json"
    done = int(read_metadata(state)["step"]) if state.exists() else 0
    asked = {"steps": config.steps, "batch_scale": batch_scale}
    plan: dict[str, Any] = (
        read_json(path) if path.exists() else {"asked": asked, "from": 0, "steps": config.steps, "share": 1.0}
    )
    if not path.exists() or plan["asked"] != asked:
        left = plan["share"] * (1 - min(1.0, (done - plan["from"]) / max(1, plan["steps"] - plan["from"])))
        steps = done + math.ceil(left * config.steps / batch_scale)
        plan = {"asked": asked, "from": done, "steps": steps, "share": left}
        write_json(path, plan)
    whole = config.steps / batch_scale
    return replace(
        config,
        steps=plan["steps"],
        batch_size=config.batch_size * batch_scale,
        warmup_steps=min(config.warmup_steps, math.ceil(whole / 10)),
        cooldown=min(1.0, config.cooldown * whole / max(1, plan["steps"])),
        ema_decay=config.ema_decay**batch_scale,
    )
