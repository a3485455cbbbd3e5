"""Guidance against diffusers' embedding and the plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lcm_core.diffusion.consistency import ConsistencyDenoiser, Denoiser
from lcm_core.diffusion.diffusion import Diffusion, to_x0
from lcm_core.diffusion.guidance import guidance_embedding, guide
from lcm_core.diffusion.process import VariancePreserving, abar_from_sigma
from lcm_core.diffusion.schedule import get_alphas_cumprod
from lcm_core.errors import InputError


@pytest.fixture(scope="module")
def schedule() -> VariancePreserving:
    return VariancePreserving(get_alphas_cumprod())


class Recorder:
    """A network whose noise depends on the text, on SDXL-like added conditions and on x; it counts its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, t: Tensor, **extra_args: Any) -> Tensor:
        self.calls.append({"batch": x.shape[0], **extra_args})
        text = extra_args["encoder_hidden_states"].mean((1, 2))
        ids = extra_args.get("added_cond_kwargs", {}).get("time_ids", torch.zeros(x.shape[0], 1)).sum(1)
        return torch.tanh(x * text.reshape(-1, 1, 1, 1) + ids.reshape(-1, 1, 1, 1)) + 0.001 * t.reshape(-1, 1, 1, 1)


def condition(seed: int, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(batch, 7, 5, generator=generator),
        "added_cond_kwargs": {"time_ids": torch.randn(batch, 6, generator=generator)},
    }


@pytest.mark.parametrize("dim", [256, 512, 33])
def test_embedding_differs_from_diffusers(dim: int) -> None:
    from diffusers import LatentConsistencyModelPipeline

    w = torch.tensor([0.0, 0.5, 6.5, 7.0, 13.0])
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, dim)  # type: ignore[arg-type]
    assert expected.shape == (5, dim)
    torch.testing.assert_close(guidance_embedding(w, dim), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("kind", [Denoiser, ConsistencyDenoiser])
def test_cfg_differs_from_the_formula(schedule: VariancePreserving, kind: type[Denoiser], per_image: bool) -> None:
    """eps~ = (1 + w) eps_c - w eps_u with w = guidance_scale - 1; in one call of twice the batch."""
    unet, cond, uncond = Recorder(), condition(1), condition(2)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)) * 4
    sigma = schedule.sigmas[[759, 259]].float()
    scale = torch.tensor([3.0, 8.5]) if per_image else torch.tensor([8.5, 8.5])
    guided = guide(kind(unet, Diffusion(schedule)), cond, uncond, scale if per_image else 8.5)
    actual = guided(x, sigma)
    assert [call["batch"] for call in unet.calls] == [4]

    level, w = sigma.reshape(-1, 1, 1, 1), (scale - 1).reshape(-1, 1, 1, 1)
    abar = abar_from_sigma(level)
    x_t, t = x * abar.sqrt(), torch.tensor([759.0, 259.0])
    eps = (1 + w) * unet(x_t, t, **cond) - w * unet(x_t, t, **uncond)
    # the boundary scalings change it by less than 1e-5 at these t
    expected = to_x0(eps, x_t, abar.sqrt(), (1 - abar).sqrt(), "epsilon")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scale", "uncond"), [(1.0, condition(2)), (1, condition(2)), (7.5, None)])
def test_negative_pass_runs_for_nothing(
    schedule: VariancePreserving, scale: float, uncond: dict[str, Any] | None
) -> None:
    unet, cond = Recorder(), condition(1)
    denoiser = Denoiser(unet, Diffusion(schedule))
    x, sigma = torch.randn(2, 4, 6, 6), torch.full((2,), 3.0)
    actual = guide(denoiser, cond, uncond, scale)(x, sigma)
    assert [call["batch"] for call in unet.calls] == [2]
    torch.testing.assert_close(actual, denoiser(x, sigma, **cond))


@pytest.mark.parametrize("scale", [8.0, torch.tensor([1.0, 8.0])])
def test_w_conditioning_is_wrong(schedule: VariancePreserving, scale: float | Tensor) -> None:
    """A full LCM reads w = guidance_scale - 1, each image its own, and has no negative pass, even at scale 1."""
    unet, cond = Recorder(), condition(1)
    guide(Denoiser(unet, Diffusion(schedule)), cond, condition(2), scale, 256)(
        torch.randn(2, 4, 6, 6), torch.full((2,), 3.0)
    )
    (call,) = unet.calls
    assert call["batch"] == 2
    w = torch.tensor([0.0, 7.0]) if isinstance(scale, Tensor) else torch.tensor([7.0, 7.0])
    torch.testing.assert_close(call["timestep_cond"], guidance_embedding(w, 256), rtol=0, atol=0)
    assert call["encoder_hidden_states"] is cond["encoder_hidden_states"]


def test_extra_args_are_lost(schedule: VariancePreserving) -> None:
    """What a sampler passes on must reach the network in every pass, positive first."""
    x, sigma = torch.randn(2, 4, 6, 6), torch.full((2,), 3.0)
    extra = torch.tensor([10.0, 20.0])
    for scale, dim, expected in ((1.0, None, [10, 20]), (5.0, None, [10, 20, 10, 20]), (5.0, 256, [10, 20])):
        unet = Recorder()
        guide(Denoiser(unet, Diffusion(schedule)), condition(1), condition(2), scale, dim)(
            x, sigma, extra=extra, flag="on"
        )
        assert unet.calls[0]["extra"].tolist() == expected
        assert unet.calls[0]["flag"] == "on"
    both = torch.cat([condition(1)["encoder_hidden_states"], condition(2)["encoder_hidden_states"]])
    unet = Recorder()
    guide(Denoiser(unet, Diffusion(schedule)), condition(1), condition(2), 5.0)(x, sigma)
    assert torch.equal(unet.calls[0]["encoder_hidden_states"], both)
    assert unet.calls[0]["added_cond_kwargs"]["time_ids"].shape == (4, 6)


def test_unlike_conditions_are_accepted() -> None:
    cond, uncond = condition(1), condition(2)
    uncond["encoder_hidden_states"] = torch.zeros(2, 9, 5)
    with pytest.raises(InputError, match=r"encoder_hidden_states is \(2, 7, 5\) in cond but \(2, 9, 5\) in uncond"):
        guide(lambda x, sigma: x, cond, uncond, 4.0)
    del uncond["added_cond_kwargs"]
    with pytest.raises(InputError, match="give both the same entries"):
        guide(lambda x, sigma: x, cond, uncond, 4.0)
