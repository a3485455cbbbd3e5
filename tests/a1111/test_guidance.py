"""The guidance embedding: read from the checkpoint's file, added to the network from outside, and taken out again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from extension_a1111.guidance_embedding import GuidanceHook, read_cond_proj

EMOJI = Path(__file__).parents[2] / "lcm_core" / "models" / "emoji"


class Network(nn.Module):
    """As much of a U-Net as the hook touches, in ldm's layout, with the weights of diffusers' module."""

    def __init__(self, reference: TimestepEmbedding) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(reference.linear_1, nn.SiLU(), reference.linear_2)

    def forward(self, times: Tensor) -> Tensor:
        return self.time_embed(times)


@pytest.fixture
def reference() -> TimestepEmbedding:
    torch.manual_seed(0)
    return TimestepEmbedding(32, 128, cond_proj_dim=256)


def diffusers_embedding(guidance_scale: float) -> Tensor:
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    return embed(None, torch.tensor([guidance_scale - 1]), embedding_dim=256)  # type: ignore[arg-type]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 7.5, 14.0])
@torch.no_grad()
def test_network_reads_guidance_as_diffusers_does(reference: TimestepEmbedding, guidance_scale: float) -> None:
    """For every row of the batch, in the middle of a step, through a denoiser that knows nothing of it."""
    network = Network(reference)
    times = torch.randn(3, 32)
    hook = GuidanceHook()
    hook.attach(network.time_embed, reference.cond_proj.weight)
    steps = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        steps.append(hook.is_wanted)
        return network(x)

    guided = hook.guide(denoise, guidance_scale, 256)
    wanted = reference(times, diffusers_embedding(guidance_scale).expand(3, -1))
    torch.testing.assert_close(guided(times, torch.ones(3)), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(guided(times, torch.ones(3)), network(times), atol=1e-3)
    assert steps == [True, True]
    assert not hook.is_wanted


@torch.no_grad()
def test_outside_a_step_and_after_detaching_the_network_is_untouched(reference: TimestepEmbedding) -> None:
    network, other = Network(reference), Network(TimestepEmbedding(32, 128))
    times = torch.randn(1, 32)
    plain, plain_other = network(times), other(times)
    hook = GuidanceHook()
    guided = hook.guide(lambda x, sigma, **_: (network(x), other(x)), 8.0, 256)  # type: ignore[arg-type,return-value]
    hook.attach(network.time_embed, reference.cond_proj.weight)
    torch.testing.assert_close(network(times), plain, rtol=0, atol=0)
    hook.attach(other.time_embed, None)  # the host went on to a model without guidance embedding
    got = guided(times, torch.ones(1))
    torch.testing.assert_close(got[0], plain, rtol=0, atol=0)
    torch.testing.assert_close(got[1], plain_other, rtol=0, atol=0)
    hook.detach()
    assert not network.time_embed._forward_pre_hooks
    assert not other.time_embed._forward_pre_hooks


@torch.no_grad()
def test_half_precision_keeps_its_dtype(reference: TimestepEmbedding) -> None:
    network = Network(reference).bfloat16()
    hook = GuidanceHook()
    hook.attach(network.time_embed, reference.cond_proj.weight.float())
    times = torch.randn(2, 32, dtype=torch.bfloat16)
    assert hook.guide(lambda x, sigma, **_: network(x), 8.0, 256)(times, torch.ones(2)).dtype == torch.bfloat16


def test_cond_proj_is_read_again_when_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    name = "model.diffusion_model.time_embed.cond_proj.weight"
    save_file({name: torch.ones(4, 2)}, file)
    assert read_cond_proj(file).tolist() == torch.ones(4, 2).tolist()  # type: ignore[union-attr]
    save_file({name: torch.zeros(4, 2, dtype=torch.float16)}, file)
    import os

    os.utime(file, ns=(1, 1))
    again = read_cond_proj(file)
    assert again is not None
    assert (again.dtype, again.abs().sum()) == (torch.float32, 0)
    save_file({"model.diffusion_model.time_embed.0.weight": torch.ones(4, 2)}, file)
    os.utime(file, ns=(2, 2))
    assert read_cond_proj(file) is None


def test_pickles_and_missing_files_have_no_guidance(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04")
    assert read_cond_proj(tmp_path / "model.ckpt") is None
    assert read_cond_proj(tmp_path / "gone.safetensors") is None
