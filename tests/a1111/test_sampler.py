"""What stands between a web UI's denoiser and lcm_core's sampler: grid, consistency and the idle negative pass."""

from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler
from torch import Tensor

from extension_a1111.denoising import PositiveRows, consistency, first_rows
from extension_a1111.schedules import get_sigmas_padded
from lcm_core.diffusion.consistency import ConsistencyDenoiser, Denoiser
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.process import VariancePreserving
from lcm_core.diffusion.samplers import sample_lcm
from lcm_core.errors import InputError

PROCESS = VariancePreserving()


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_host_cuts_the_padded_grid_to_diffusers_timesteps(steps: int, strength: float) -> None:
    """The web UI asks for steps / strength levels and uses the last steps + 1 of them (setup_img2img_steps)."""
    host_steps = int(steps / min(strength, 0.999))
    sigmas = get_sigmas_padded(PROCESS, steps, host_steps, strength=strength)
    assert len(sigmas) == host_steps + 1
    used = sigmas[host_steps - (steps - 1) - 1 :]
    scheduler = LCMScheduler()
    scheduler.set_timesteps(steps, strength=strength)
    assert PROCESS.sigma_to_t(used[:-1]).tolist() == scheduler.timesteps.tolist()
    assert used[-1] == 0


def test_more_steps_than_the_grid_has_are_refused() -> None:
    with pytest.raises(InputError, match="60 steps are more than original_steps=50"):
        get_sigmas_padded(PROCESS, 60, 60)


def unet(x: Tensor, t: Tensor, **_: object) -> Tensor:
    return torch.tanh(x) + t.reshape(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_consistency_of_a_hosts_x0_is_lcm_cores(prediction_type: str) -> None:
    """Down to t = 19, where c_skip matters most; x0 comes from the host, f must be the same as from the network."""
    sigmas = get_sigmas_padded(PROCESS, 8, 8)[-3:]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    wanted = sample_lcm(
        ConsistencyDenoiser(unet, Diffusion(PROCESS, prediction_type)),
        x,
        sigmas,
        noise_sampler=lambda *_: torch.ones_like(x),
    )
    host = Denoiser(unet, Diffusion(PROCESS, prediction_type))
    got = sample_lcm(consistency(host, PROCESS), x, sigmas, noise_sampler=lambda *_: torch.ones_like(x))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    low = torch.tensor([PROCESS.sigmas[1]]).float().expand(2)
    assert (host(x, low) - consistency(host, PROCESS)(x, low)).abs().max() > 1e-4


def host_step(forward: object, x: Tensor, cond: Tensor, uncond: Tensor, scale: float, split: str) -> Tensor:
    """A step of the web UI's CFGDenoiser: rows in one call, or in two, then the mix."""
    sigma = torch.ones(len(x))
    if split == "together":
        rows = {"c_crossattn": [torch.cat([cond, uncond])], "c_concat": [torch.cat([x, x])]}
        out = forward(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=rows)  # type: ignore[operator]
    else:
        parts = [forward(x, sigma, cond={"crossattn": part, "vector": part}) for part in (cond, uncond)]  # type: ignore[operator]
        out = torch.cat(parts)
    positive, negative = out.chunk(2)
    return negative + (positive - negative) * scale


@pytest.mark.parametrize("split", ["together", "apart"])
@pytest.mark.parametrize("batch", [1, 3])
def test_idle_negative_rows_are_not_computed(split: str, batch: int) -> None:
    """At guidance 1 half the rows are computed and the result is the same."""
    seen: list[int] = []

    def forward(x: Tensor, sigma: Tensor, cond: dict[str, object]) -> Tensor:
        seen.append(len(x))
        text = cond.get("crossattn")
        text = cond["c_crossattn"][0] if text is None else text  # type: ignore[index]
        assert len(text) == len(x) == len(sigma)  # type: ignore[arg-type]
        return x * text.reshape(-1, 1, 1, 1)  # type: ignore[attr-defined]

    x = torch.randn(batch, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    cond, uncond = torch.arange(batch) + 2.0, torch.full((batch,), -7.0)
    rows = PositiveRows()
    wrapped = rows.wrap(forward)
    rows.begin(None)
    torch.testing.assert_close(
        host_step(wrapped, x, cond, uncond, 3.0, split), x * (uncond + 3 * (cond - uncond)).reshape(-1, 1, 1, 1)
    )
    assert sum(seen) == 2 * batch
    for _ in range(2):  # every step anew
        seen.clear()
        rows.begin(batch)
        got = host_step(wrapped, x, cond, uncond, 1.0, split)
        torch.testing.assert_close(got, x * cond.reshape(-1, 1, 1, 1))
        assert seen == [batch]


def test_first_rows_reach_into_what_hosts_pass() -> None:
    cond = {"a": torch.arange(4), "b": [torch.arange(4), {"c": torch.arange(4)}], "d": None, "e": "text"}
    got = first_rows(cond, 1)
    assert [got["a"].tolist(), got["b"][0].tolist(), got["b"][1]["c"].tolist()] == [[0]] * 3
    assert (got["d"], got["e"]) == (None, "text")
