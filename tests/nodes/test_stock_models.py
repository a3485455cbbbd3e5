"""Models that the host's own loader gave, and what its own saving is given, with stand-ins for what the host has."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lcm_core.errors import InputError
from lcm_core.pipeline.settings import Settings
from tests.nodes.model_samplings import Discrete, Flow

X0 = 2.0
"""Of every pixel: the oracle knows it."""
SAVING = "process_unet_state_dict_for_saving"
UNET = "model.diffusion_model."


class Config:
    """The host's configuration of a U-Net."""

    def __init__(self) -> None:
        self.unet_config = {"model_channels": 320, "context_dim": 768}

    def process_unet_state_dict_for_saving(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The host's own way to save it."""
        return {f"{UNET}{name}": value for name, value in state.items()}


class HostModel:
    """A MODEL as the stock loader of a newer host gives it, which notes the file."""

    def __init__(self, file: Path) -> None:
        self.model = SimpleNamespace(model_config=Config(), model_sampling=Discrete(), model_type=None)
        self.patches: dict[str, Any] = {}
        self.attachments: dict[str, Any] = {}
        self.object_patches: dict[str, Any] = {}
        self.patches_uuid = uuid.uuid4()
        self.cached_patcher_init = (print, (str(file),), 0)

    def clone(self) -> HostModel:
        """Patches of its own on the same model."""
        other = HostModel(Path(self.cached_patcher_init[1][0]))
        other.model = self.model
        for name in ("patches", "attachments", "object_patches"):
            setattr(other, name, dict(getattr(self, name)))
        return other

    def add_patches(self, patches: dict[str, Any]) -> None:
        """Changes of weights."""
        self.patches |= patches

    def set_attachments(self, key: str, value: Any) -> None:
        """What travels with it."""
        self.attachments[key] = value

    def add_object_patch(self, name: str, value: Any) -> None:
        """What takes the place of a part."""
        self.object_patches[name] = value

    def get_model_object(self, name: str) -> Any:
        """A part, as patched."""
        return self.object_patches.get(name) or getattr(self.model, name)


@pytest.fixture
def full_lcm(tmp_path: Path) -> HostModel:
    """Of a file with a guidance input, which the host knows nothing of."""
    torch.manual_seed(0)
    weights = {"time_embed.cond_proj.weight": torch.randn(8, 16), "time_embed.0.weight": torch.randn(12, 8)}
    file = tmp_path / "full.safetensors"
    said = {"lcm_suite.recommended": json.dumps({"guidance_scale": 3.5})}
    save_file({f"{UNET}{name}": value for name, value in weights.items()}, file, said)
    return HostModel(file)


def test_a_full_lcm_from_the_stock_loader_gets_guidance_once(runtime: Any, full_lcm: HostModel, tmp_path: Path) -> None:
    """Taken for a plain model, it would be given a negative pass beside the guidance that its network reads."""
    from lcm_suite_nodes import guidance, model_patches, sampling

    facts = model_patches.inspect_model(full_lcm)
    assert facts.describe().startswith("full LCM (SD 1.x")
    assert facts.guidance_scale == 3.5
    painter = sampling.Painter(full_lcm, Settings(guidance_scale=5.0), [], None)
    assert painter.cfg == 1
    given = guidance.get_guidance(painter.model)
    torch.testing.assert_close(given.shift, facts.guidance.shift_for(5.0), rtol=0, atol=0)
    save_file({f"{UNET}time_embed.0.weight": torch.ones(12, 8)}, tmp_path / "plain.safetensors")
    plain = HostModel(tmp_path / "plain.safetensors")
    assert model_patches.inspect_model(plain).describe().startswith("plain model")
    with pytest.raises(InputError, match="guidance_scale 5 needs a negative prompt"):
        sampling.Painter(plain, Settings(guidance_scale=5.0), [], None)


def test_what_the_host_saves_of_a_full_lcm_has_its_guidance_input(runtime: Any, full_lcm: HostModel) -> None:
    """The stock node asks the MODEL's configuration, as it is patched, for what to write."""
    from lcm_suite_nodes import attachments, guidance

    guided = attachments.with_guidance(full_lcm, 5.0)
    known = guidance.get_guidance(guided)
    state = {"time_embed.0.bias": known.shift.clone(), "time_embed.0.weight": known.linear_1}
    saved = guided.object_patches[f"model_config.{SAVING}"](state)
    torch.testing.assert_close(saved[f"{UNET}time_embed.cond_proj.weight"], known.cond_proj, rtol=0, atol=0)
    assert not saved[f"{UNET}time_embed.0.bias"].any()


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_the_sampler_feeds_a_flow_model_its_own_mixture(runtime: Any, name: str) -> None:
    """(1 - s) x0 + s eps at every step; with the noise of other models it would be x0 + s eps."""
    from lcm_suite_nodes import sampling

    base = SimpleNamespace(model_sampling=Flow(), model_type=SimpleNamespace(name="FLOW"))
    noise, grid, fed = torch.randn(1, 4, 128, 128), torch.tensor([1.0, 0.75, 0.5, 0.0]), []

    class Oracle:
        """The host's model during sampling."""

        inner_model = SimpleNamespace(inner_model=base)
        latent_image = torch.zeros(1, 4, 128, 128)

        def __init__(self) -> None:
            self.noise = noise

        def __call__(self, x: Tensor, s: Tensor, **_: Any) -> Tensor:
            fed.append((float(s[0]), x))
            return torch.full_like(x, X0)

    result = sampling.sample(Oracle(), noise.clone(), grid, {"seed": 3}, name=name)
    for s, x in [*fed, (0.0, result)]:
        assert float(x.mean()) == pytest.approx((1 - s) * X0, abs=0.02)
        assert float(x.std()) == pytest.approx(s, abs=0.02)
