"""The embedded model's VAE at the width at which a host's stock loaders build one."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from lcm_core.files.ldm_convert import vae_to_diffusers, vae_to_ldm
from lcm_core.files.safetensors import read_safetensors
from lcm_core.pipeline.sources import MODELS
from tests.nodes.conftest import OURS, load_package

STABLE_DIFFUSION = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}


@pytest.fixture
def native_vae() -> Any:
    """nodes/native_vae.py, which needs no host."""
    load_package()
    return importlib.import_module(f"{OURS}.native_vae")


@pytest.fixture(scope="module")
def narrow() -> dict[str, torch.Tensor]:
    """The shipped weights, in the ldm layout."""
    return vae_to_ldm(read_safetensors(MODELS / "emoji" / "vae" / "diffusion_pytorch_model.safetensors")[0])


def test_the_wide_vae_encodes_and_decodes_as_the_shipped_one(native_vae: Any, narrow: dict[str, torch.Tensor]) -> None:
    """In diffusers' AutoencoderKL of Stable Diffusion's sizes, with no weight missing or left over."""
    from diffusers import AutoencoderKL

    own = AutoencoderKL.from_pretrained(MODELS / "emoji" / "vae")
    with torch.device("meta"):  # without the time that random weights take
        usual = AutoencoderKL(**STABLE_DIFFUSION).eval()
    wide = native_vae.to_usual_width({name: weight.float() for name, weight in narrow.items()})
    usual.load_state_dict(vae_to_diffusers(wide), assign=True)
    generator = torch.Generator().manual_seed(0)
    image, latents = torch.randn(1, 3, 16, 24, generator=generator), torch.randn(1, 4, 2, 3, generator=generator)
    with torch.no_grad():
        moments = [vae.encode(image).latent_dist.parameters for vae in (own, usual)]
        decoded = [vae.decode(latents).sample for vae in (own, usual)]
    torch.testing.assert_close(moments[1], moments[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded[1], decoded[0], rtol=1e-4, atol=1e-4)


def test_only_the_shipped_vae_at_its_own_width_is_taken(native_vae: Any, narrow: dict[str, torch.Tensor]) -> None:
    """Any other is left to the host: a wide one, and one of this width with more blocks; nothing else is taken out."""
    checkpoint = {f"first_stage_model.{name}": weight for name, weight in narrow.items()}
    others = {"model.diffusion_model.out.2.weight": torch.zeros(1)}
    state = checkpoint | others
    assert native_vae.take_vae(state).keys() == narrow.keys()
    assert state.keys() == others.keys()
    assert native_vae.take_vae(state) is None
    assert not native_vae.is_own(native_vae.to_usual_width(narrow))
    assert not native_vae.is_own(narrow | {"encoder.down.0.block.1.conv1.weight": torch.zeros(1)})
