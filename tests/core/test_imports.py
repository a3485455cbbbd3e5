"""The quick start of the command line, each time in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


def test_a_picture_is_painted_without_what_it_does_not_need(tmp_path: Path):
    code = """
import sys
from lcm_core.cli.main import start
try:
    start()
finally:
    unused = ("peft.auto", "scipy.stats._stats_py", "transformer_flux", "autoencoder_kl_wan", "unet_kandinsky3")
    print([name for name in sys.modules if name.endswith(unused)])
"""
    picture = tmp_path / "apple.png"
    said = run(code, "generate", "a red apple", "--steps", "1", "--output", str(picture))
    assert said.endswith("[]\n")
    assert picture.exists()


def test_the_trainer_starts_as_quickly():
    code = """
import sys
from trainer.cli.main import start
try:
    start()
finally:
    from diffusers import UNet2DConditionModel
    print([name for name in sys.modules if name.endswith(("peft.auto", "scipy.stats._stats_py", "transformer_flux"))])
"""
    assert run(code, "presets").endswith("[]\n")


def test_a_network_that_is_asked_for_later_is_there():
    code = """
from lcm_core.cli.imports import leave_out_unused
leave_out_unused()
import diffusers, importlib
from diffusers import UNet2DConditionModel
from diffusers.models import SD3Transformer2DModel, transformers
from diffusers.models.transformers import FluxTransformer2DModel
assert diffusers.FluxTransformer2DModel is FluxTransformer2DModel
once = importlib.import_module("diffusers.models.transformers.transformer_2d")
import scipy.stats
assert scipy.stats.norm.cdf(0) == 0.5
assert transformers.Transformer2DModel is once.Transformer2DModel
assert type(transformers) is type(importlib) and transformers.__path__ and transformers.__loader__.get_filename()
try:
    transformers.Nothing
except AttributeError as error:
    print(error)
"""
    assert run(code) == "module 'diffusers.models.transformers' has no attribute 'Nothing'\n"
