"""LCM Distiller on a flow model beside the same run on the model that it was made of, in a real ComfyUI.

    python benchmarks/flow_twin.py COMFYUI FOLDER

runs in the Python of that ComfyUI. It distils the embedded teacher, which predicts v, and the same teacher as a flow
model by an exact change of variables, with the same latents, prompts, steps and seed. It prints the Frechet distance of
what each student paints in 4 steps from the benchmark's drawings, and their ratio. FOLDER is a ComfyUI data folder of
its own; started again, it goes on from there.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT / "tests" / "nodes")

from host_start import load_suite, start  # noqa: E402

CHECKOUT, FOLDER = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
start(CHECKOUT, FOLDER)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from lcm_core.files.atomic import atomic_write  # noqa: E402
from trainer.evaluate.metrics import frechet_distance  # noqa: E402
from trainer.recipes.emoji.benchmark import load_benchmark  # noqa: E402
from trainer.recipes.emoji.data import load_shipped  # noqa: E402
from trainer.recipes.emoji.features import extract  # noqa: E402

MODELS = {"v": "emoji teacher", "flow": "emoji teacher as a flow model"}
TRAINED, PAINTED, AT_ONCE = 128, 512, 32  # latents to learn from, pictures to measure
SHAPE = load_shipped()[0].shape[1:]
RUN = {"steps": 48, "batch_size": 8, "rank": 16, "learning_rate": 1e-3, "w": 1.0, "method": "lcd", "seed": 1}
SHOWN = " (shipped with LCM Suite)"


def joined(prompts: list[Any]) -> list[Any]:
    """Conditioning of one batch."""
    return [[torch.cat([prompt[0] for prompt in prompts]), {}]]


def teach(model: Any, prompts: list[Any], negative: list[Any]) -> Tensor:
    """What the teacher paints in 20 steps, to learn from."""
    parts, sampler = [], importlib.import_module("nodes").KSampler()  # of ComfyUI's module, not of our package
    for first in range(0, TRAINED, AT_ONCE):
        empty = {"samples": torch.zeros(AT_ONCE, *SHAPE)}
        positive = joined(prompts[first : first + AT_ONCE])
        settings = (100 + first, 20, 2.0, "dpmpp_2m", "simple")
        parts.append(sampler.sample(model, *settings, positive, negative, empty)[0]["samples"])
    return torch.cat(parts)


def distance(suite: dict[str, Any], model: Any, vae: Any, prompts: list[Any], benchmark: Any) -> float:
    """The Frechet distance of a student's pictures."""
    features = []
    for first in range(0, PAINTED, AT_ONCE):
        settings = {"seed": 5000 + first, "steps": 4, "guidance_scale": 1.0, "sampler": "lcm"}
        positive, empty = joined(prompts[first : first + AT_ONCE]), {"samples": torch.zeros(AT_ONCE, *SHAPE)}
        painted = suite["LCMKSampler"].EXECUTE_NORMALIZED(
            model=model, positive=positive, latent_image=empty, **settings
        )
        images = vae.decode(painted.args[0]["samples"]).movedim(-1, 1)
        features.append(extract(benchmark.features, (images * 255).round().clamp(0, 255).byte()))
    return float(frechet_distance(benchmark.real, torch.cat(features)))


def main() -> None:
    """Both runs, and what came of them."""
    for name in ("loras", "checkpoints"):
        (FOLDER / "models" / name).mkdir(parents=True, exist_ok=True)
    suite, benchmark = load_suite(), load_benchmark(PAINTED)
    results = FOLDER / "results.json"
    found: dict[str, float] = json.loads(results.read_text()) if results.exists() else {}
    load = suite["LCMCheckpointLoader"].EXECUTE_NORMALIZED
    models = {kind: load(ckpt_name=name + SHOWN).args for kind, name in MODELS.items()}
    teacher, clip, vae, _ = models["v"]
    captions = [benchmark.entries[i].plain_caption for i in benchmark.chosen.tolist()]
    prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(caption))[0] for caption in captions]
    negative = [clip.encode_from_tokens_scheduled(clip.tokenize(""))[0]]
    data = {"samples": teach(teacher, prompts, negative)}
    for kind, (model, *_) in models.items():
        if kind in found:
            continue
        given = {"latents": data, "positive": prompts[:TRAINED], "negative": negative, "output_name": kind}
        student = suite["LCMDistiller"].EXECUTE_NORMALIZED(model=model, preview_every=RUN["steps"], **given, **RUN)
        found[kind] = distance(suite, student.args[0], vae, prompts, benchmark)
        with atomic_write(results) as temporary:
            temporary.write_text(json.dumps(found))
    print(json.dumps(found | {"ratio": found["flow"] / found["v"]}))


if __name__ == "__main__":
    with torch.inference_mode():  # as ComfyUI executes nodes
        main()
