"""Methods of distillation on a rectified flow: the embedded teacher by an exact change of variables, beside itself.

    python benchmarks/flow_methods.py FOLDER        # some twenty minutes on a CPU; goes on where it stopped

A LoRA is trained on the teacher as it is, which predicts v, and on the same teacher as a flow, with the same drawings,
steps and seeds. dmd2 starts from what lcd has learnt after half of the steps, and tdm, which is sampled without fresh
noise, from what segmented has: an LCM's pictures are worse by that path. Both get the other half in seconds of the
processor. Printed are the Frechet distance, recall and alignment of pictures in 4 steps, on the embedded benchmark.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcm_core.diffusion.as_flow import as_flow
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.process import RectifiedFlow
from lcm_core.files.safetensors import read_safetensors, write_json, write_safetensors
from lcm_core.networks.lora_layers import lora_state_dict
from lcm_core.networks.unet import UNet
from lcm_core.pipeline.model import Model, load_model
from trainer.config import LoopConfig, StudentConfig
from trainer.data.cache import LatentCache, prepare
from trainer.data.settings import DataConfig
from trainer.distill import distill
from trainer.evaluate.scores import benchmark_evaluation, evaluate_rows
from trainer.methods.config import MethodConfig, method_config
from trainer.methods.method import get_method, sampling_of
from trainer.recipes.emoji.benchmark import load_benchmark
from trainer.students import Student, lora_student, prepare_unet, to_network

FLOW = Diffusion(RectifiedFlow(shift=2.0), "flow")
"""With steps spaced about as those of the v teacher's schedule."""
W = {"w_min": 1.0, "w_max": 1.0}
RANK, RATE, MATCHING_RATE = 16, 1e-3, 2e-4
REHEARSED, FIRST = 6, 1
"""Steps that tell how long one takes, and how many of them do not count."""


class FlowUNet(UNet):
    """A U-Net that is called as the flow which says the same."""

    def __init__(self, unet: UNet, diffusion: Diffusion) -> None:
        super().__init__(unet.model)
        self.flow = as_flow(super().__call__, diffusion)

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:  # type: ignore[override]
        """Timesteps t are those of `FLOW`."""
        return self.flow(x, t / FLOW.process.num_train_timesteps, **cond)


@dataclass(frozen=True)
class Run:
    """One student."""

    name: str
    is_flow: bool
    method: MethodConfig
    begins_with: str = ""
    """The run that its first half is of."""


RUNS = (
    Run("v, lcd", False, method_config("lcd", **W)),
    Run("flow, half of lcd", True, method_config("lcd", **W)),
    Run("flow, lcd", True, method_config("lcd", **W)),
    Run("flow, half lcd, then dmd2", True, method_config("dmd2", **W), "flow, half of lcd"),
    Run("flow, half of segmented", True, method_config("segmented", **W)),
    Run("flow, half segmented, then tdm", True, method_config("tdm", **W), "flow, half of segmented"),
)


def main() -> None:
    """All runs that are not done yet, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of everything")
    parser.add_argument("--steps", type=int, default=96, help="of lcd (default: 96)")
    parser.add_argument("--batch-size", type=int, default=8, help="of every step (default: 8)")
    parser.add_argument("--samples", type=int, default=512, help="pictures that are measured (default: 512)")
    args = parser.parse_args()
    cache = prepare(DataConfig(path="emoji", shard_size=4096), "emoji", args.folder / "cache", "cpu")
    file = args.folder / "results.json"
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for run in RUNS:
        if run.name not in rows:
            rows[run.name] = measure(run, rows, cache, args)
            write_json(file, rows)
    for name, row in rows.items():
        print(f"{name:30}" + "".join(f"  {key} {value:.4g}" for key, value in row.items()))


def measure(
    run: Run, rows: Mapping[str, Mapping[str, Any]], cache: LatentCache, args: argparse.Namespace
) -> dict[str, Any]:
    """Train one student and score it."""
    folder = args.folder / run.name.replace(" ", "_")
    model, student, diffusion = make(run, args.folder)
    steps = args.steps
    if "half of" in run.name:
        steps = args.steps // 2
    if run.begins_with:
        steps = affordable(run, rows[run.begins_with]["seconds"], cache, args)
    started = time.process_time()
    train(run, student, diffusion, cache, steps, args.batch_size, folder)
    said = replace(sampling_of(run.method), guidance_scale=1.0)
    seconds = time.process_time() - started + (rows[run.begins_with]["seconds"] if run.begins_with else 0.0)
    write_safetensors(folder / "lora.safetensors", lora_state_dict(student.unet, ema=True))
    assert student.adapters is not None
    evaluation = benchmark_evaluation(load_benchmark(args.samples))
    with student.adapters.using(student.final), torch.no_grad():
        painted = replace(model, diffusion=diffusion, recommended=said)
        (scores,) = evaluate_rows(run.name, painted, evaluation, [4], progress=True)
    wanted = {name: scores[name] for name in ("fd", "recall", "alignment")}
    return {**wanted, "steps": steps, "seconds": seconds}


def make(run: Run, root: Path) -> tuple[Model, Student, Diffusion]:
    """The teacher with what is to be trained on it."""
    model = load_model("emoji", "cpu", "float32", unet="teacher")
    diffusion = model.diffusion
    assert isinstance(model.unet, UNet)
    if run.is_flow:
        model.unet, diffusion = FlowUNet(model.unet, diffusion), FLOW
    config = StudentConfig(rank=RANK)
    side = model.resolution // model.vae.scale
    prepare_unet(model.unet.model, config, (side, side))
    torch.manual_seed(0)
    begun = root / run.begins_with.replace(" ", "_") / "lora.safetensors"
    start = read_safetensors(begun)[0] if run.begins_with else None
    critic = get_method(run.method).needs_critic
    network = to_network(model.unet)
    return model, lora_student(model.unet.model, network, config, with_critic=critic, start=start), diffusion


def train(
    run: Run, student: Student, diffusion: Diffusion, cache: LatentCache, steps: int, batch: int, folder: Path
) -> list[float]:
    """Train, from wherever it was stopped. Returns the seconds of each step."""
    rate = RATE if run.method.kind == "lcd" else MATCHING_RATE
    loop = LoopConfig(
        steps=steps,
        batch_size=batch,
        learning_rate=rate,
        warmup_steps=min(10, steps),
        cooldown=0.5,
        ema_decay=0.95,
        tensorboard=False,
    )
    moments = [time.process_time()]
    distill(
        student, cache, diffusion, run.method, loop, folder, callback=lambda *_: moments.append(time.process_time())
    )
    return [after - before for before, after in pairwise(moments)]


def affordable(run: Run, seconds: float, cache: LatentCache, args: argparse.Namespace) -> int:
    """Steps of a run that take as long as what it begins with did."""
    _, student, diffusion = make(run, args.folder)
    folder = args.folder / f"rehearsal_{run.method.kind}"
    file = folder / "steps.json"
    if not file.exists():
        took = train(run, student, diffusion, cache, REHEARSED, args.batch_size, folder)
        write_json(file, {"steps": max(1, round(seconds / statistics.mean(took[FIRST:])))})
    return int(json.loads(file.read_text())["steps"])


if __name__ == "__main__":
    main()
