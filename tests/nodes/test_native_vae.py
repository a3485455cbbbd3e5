"""The embedded model's VAE as a host's stock loaders build one."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from lcm_core.files.checkpoint import read_component
from lcm_core.files.ldm_convert import vae_to_ldm
from lcm_core.pipeline.sources import MODELS
from tests.nodes.conftest import OURS, load_package


@pytest.fixture
def native_vae() -> Any:
    """nodes/native_vae.py, which needs no host."""
    load_package()
    return importlib.import_module(f"{OURS}.native_vae")


@pytest.fixture(scope="module")
def narrow() -> dict[str, torch.Tensor]:
    """The shipped weights, in the ldm layout."""
    return vae_to_ldm(read_component(MODELS / "emoji", "vae").tensors)


def test_the_taesd_encodes_and_decodes_as_the_tiny_vae(native_vae: Any) -> None:
    """In diffusers' AutoencoderTiny of TAESD's sizes, with no weight missing or left over."""
    from diffusers import AutoencoderTiny

    own = AutoencoderTiny.from_pretrained(MODELS / "emoji" / "vae_tiny").float().eval()
    taesd, wide = AutoencoderTiny().eval(), native_vae.as_taesd()
    assert (wide.pop("vae_scale").item(), wide.pop("vae_shift").item()) == (pytest.approx(0.18215), 0)
    weights = {}
    for name, weight in wide.items():  # the decoder of diffusers clamps without a layer
        half, number, rest = name.removeprefix("taesd_").split(".", 2)
        weights[f"{half}.layers.{int(number) - (half == 'decoder')}.{rest}"] = weight
    taesd.load_state_dict(weights)
    generator = torch.Generator().manual_seed(0)
    image, latents = torch.randn(1, 3, 16, 24, generator=generator), torch.randn(1, 4, 2, 3, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(taesd.encode(image).latents, own.encode(image).latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(taesd.decode(latents).sample, own.decode(latents).sample, rtol=1e-4, atol=1e-4)


def test_only_the_shipped_vae_at_its_own_width_is_taken(native_vae: Any, narrow: dict[str, torch.Tensor]) -> None:
    """Any other is left to the host: a wide one, and one of this width with more blocks; nothing else is taken out."""
    checkpoint = {f"first_stage_model.{name}": weight for name, weight in narrow.items()}
    others = {"model.diffusion_model.out.2.weight": torch.zeros(1)}
    state = checkpoint | others
    assert native_vae.take_vae(state).keys() == narrow.keys()
    assert state.keys() == others.keys()
    assert native_vae.take_vae(state) is None
    assert not native_vae.is_own(native_vae.as_taesd())
    assert not native_vae.is_own(narrow | {"encoder.down.0.block.1.conv1.weight": torch.zeros(1)})
