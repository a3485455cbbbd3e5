"""The torch-only modules must import, and sample, where a web UI's old environment has none of the big libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKED = {
    *("diffusers", "transformers", "kornia", "accelerate", "peft", "safetensors", "einops", "PIL", "av", "tqdm"),
    *("comfy", "folder_paths", "modules", "k_diffusion", "ldm", "trainer", "nodes"),
}
SCRIPT = """
import importlib, pathlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Block())
for file in sorted(pathlib.Path("lcm_core/diffusion").glob("*.py")):
    importlib.import_module(f"lcm_core.diffusion.{{file.stem}}")
importlib.import_module("lcm_core.files.atomic")

import torch
from lcm_core.diffusion.consistency import ConsistencyDenoiser
from lcm_core.diffusion.guidance import guide
from lcm_core.diffusion.samplers import initial_latents, initial_noise, sample_lcm, sample_tcd, seeded_noise_sampler
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_sigmas_lcm
from lcm_core.diffusion.process import RectifiedFlow, VariancePreserving

text = torch.ones(2, 3)
for diffusion in (Diffusion(VariancePreserving()), Diffusion(RectifiedFlow(3.0), "flow")):
    process = diffusion.process
    sigmas = get_sigmas_lcm(process, 4)
    denoiser = ConsistencyDenoiser(lambda x, t, text: torch.tanh(x) * text.mean(), diffusion)
    model = guide(denoiser, dict(text=text), dict(text=-text), 2.0)
    for sampler in (sample_lcm, sample_tcd):
        x = initial_latents(initial_noise([1, 2], (4, 8, 8)), sigmas[0], process=process)
        noise_sampler = seeded_noise_sampler([1, 2], (4, 8, 8))
        x = sampler(model, x, sigmas, noise_sampler=noise_sampler, process=process)
        assert x.shape == (2, 4, 8, 8) and bool(x.isfinite().all())
print("sampled")
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


def test_torch_only_modules_need_more_than_torch() -> None:
    result = run(SCRIPT.format(blocked=BLOCKED))
    assert result.stdout == "sampled\n", result.stderr
    assert result.stderr == ""


@pytest.mark.parametrize("name", ["diffusers", "tqdm"])
def test_blocker_blocks_nothing(name: str) -> None:
    """The test above would prove nothing if a blocked import went through."""
    result = run(SCRIPT.format(blocked=BLOCKED) + f"\nimport {name}\n")
    assert f"ImportError: {name} is blocked" in result.stderr
