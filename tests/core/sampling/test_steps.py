"""What every sampler keeps to: seeds, callbacks, number formats, masks, settings, and no wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lcm_core.diffusion.consistency import ConsistencyDenoiser, Denoiser
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_sigmas_lcm
from lcm_core.diffusion.guidance import guide
from lcm_core.diffusion.process import VariancePreserving
from lcm_core.diffusion.samplers import (
    initial_latents,
    initial_noise,
    inpaint,
    sample_dpm_2m,
    sample_dpmpp_2m,
    sample_euler,
    sample_lcm,
    sample_tcd,
    seeded_noise_sampler,
)
from lcm_core.diffusion.schedule import get_alphas_cumprod
from lcm_core.errors import InputError
from tests.core.sampling.conftest import SHAPE, TinyNet, image_latents

SAMPLERS = (sample_lcm, sample_tcd, sample_euler, sample_dpmpp_2m, sample_dpm_2m)


def test_picture_depends_on_its_batch(net: TinyNet, schedule: VariancePreserving) -> None:
    seeds = [7, 2**40, 3]
    sigmas = get_sigmas_lcm(schedule, 4)
    model = ConsistencyDenoiser(net, Diffusion(schedule))

    def draw(seeds: list[int]) -> tuple[Tensor, Tensor]:
        noise = initial_noise(seeds, SHAPE)
        x = initial_latents(noise, sigmas[0])
        return noise, sample_lcm(model, x, sigmas, disable=True, noise_sampler=seeded_noise_sampler(seeds, SHAPE))

    noise, batch = draw(seeds)
    later = seeded_noise_sampler(seeds, SHAPE)
    for i, seed in enumerate(seeds):
        noise_alone, alone = draw([seed])
        assert torch.equal(noise[i], noise_alone[0])
        torch.testing.assert_close(batch[i], alone[0])
    alone_later = seeded_noise_sampler(seeds[1:2], SHAPE)
    for _ in range(3):
        renoise = later(sigmas[0], sigmas[1])
        assert torch.equal(renoise[1], alone_later(sigmas[0], sigmas[1])[0])
        assert not torch.equal(renoise[1], noise[1])  # re-noising with the first noise would not be fresh noise
    assert not torch.equal(noise[0], noise[2])


def test_noise_changes_with_dtype() -> None:
    """The same seed must give the same picture in bf16 and in float32."""
    noise = initial_noise([5], SHAPE)
    assert torch.equal(initial_noise([5], SHAPE, dtype=torch.bfloat16), noise.to(torch.bfloat16))
    with pytest.raises(InputError, match="64 bits"):
        initial_noise([2**64], SHAPE)


class FakeFromFirstCall:
    """From its first call on every operation runs without data, so that reading a value back raises."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        self.model = model
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.entered = False

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        if not self.entered:
            self.mode.__enter__()
            self.entered = True
            x, sigma = self.mode.from_tensor(x), self.mode.from_tensor(sigma)
        return self.model(x, sigma, **extra_args)

    def close(self) -> None:
        if self.entered:
            self.mode.__exit__(None, None, None)


def without_data(sampler: Callable[..., Tensor], model: Callable[..., Tensor], sigmas: Tensor) -> Tensor:
    fake = FakeFromFirstCall(model)
    try:
        return sampler(fake, torch.randn(2, *SHAPE), sigmas, disable=True)
    finally:
        fake.close()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["plain", "cfg", "w", "inpaint"])
@pytest.mark.parametrize("denoiser", [Denoiser, ConsistencyDenoiser])
def test_step_reads_the_device(net: TinyNet, sampler: Any, kind: str, denoiser: type[Denoiser]) -> None:
    schedule = VariancePreserving(get_alphas_cumprod())
    sigmas = get_sigmas_lcm(schedule, 3)
    cond = {"encoder_hidden_states": torch.randn(2, 5, 6)}
    model: Any = denoiser(net, Diffusion(schedule))
    if kind == "inpaint":
        model = inpaint(model, torch.randn(2, *SHAPE), torch.ones(1, 1, 8, 8), torch.randn(2, *SHAPE))
    elif kind == "cfg":
        model = guide(model, cond, cond, torch.tensor([2.0, 5.0]))
    else:
        model = guide(model, cond, None, 8.0, 256 if kind == "w" else None)
    result = without_data(sampler, model, sigmas)
    assert type(result).__name__ == "FakeTensor"
    assert result.shape == (2, *SHAPE)


@pytest.mark.parametrize("read", [lambda x: float(x.max()), lambda x: bool((x > 0).any()), lambda x: x.tolist()])
def test_fake_mode_misses_a_read(read: Callable[[Tensor], Any]) -> None:
    """The test above would prove nothing if a read went through."""

    def reading(x: Tensor, sigma: Tensor) -> Tensor:
        read(x)
        return x

    with pytest.raises((DataDependentOutputException, RuntimeError)):
        without_data(sample_lcm, reading, torch.tensor([2.0, 1.0, 0.0]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_callback_or_dtype_is_wrong(net: TinyNet, schedule: VariancePreserving, sampler: Any) -> None:
    sigmas = get_sigmas_lcm(schedule, 4)
    x = initial_latents(initial_noise([1, 2], SHAPE), sigmas[0])
    start = x.clone()
    model, calls, states = Denoiser(net, Diffusion(schedule)), [], []

    def recording(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        calls.append((x, sigma, extra_args))
        return model(x, sigma)

    result = sampler(recording, x, sigmas, {"tag": 1}, states.append, True)
    assert torch.equal(x, start)  # the caller's latents are not written to
    assert [state["i"] for state in states] == [0, 1, 2, 3]
    for state, (seen, sigma, extra_args), level in zip(states, calls, sigmas[:-1], strict=True):
        assert set(state) == {"i", "x", "sigma", "sigma_hat", "denoised"}
        assert torch.equal(state["x"], seen)
        torch.testing.assert_close(state["denoised"], model(seen, sigma))
        assert sigma.shape == (2,)
        assert sigma.tolist() == [float(level)] * 2 == [float(state["sigma"])] * 2 == [float(state["sigma_hat"])] * 2
        assert extra_args == {"tag": 1}
    assert result.shape == x.shape
    timesteps: list[float] = []

    def half_net(x: Tensor, t: Tensor) -> Tensor:
        timesteps.append(float(t[0]))
        return net(x.float(), t).to(x.dtype)

    half = sampler(Denoiser(half_net, Diffusion(schedule)), x.bfloat16(), sigmas, disable=True)
    assert half.dtype == torch.bfloat16
    assert timesteps == [999, 759, 499, 259]  # sigmas in bfloat16 would blur them


def test_progress_bar_ignores_disable(capsys: pytest.CaptureFixture[str]) -> None:
    sigmas = torch.tensor([2.0, 1.0, 0.0])
    for disable, shown in ((False, True), (True, False)):
        sample_lcm(lambda x, sigma: x, torch.zeros(1, 1), sigmas, disable=disable)
        assert ("2/2" in capsys.readouterr().err) is shown


def test_inpainting_changes_the_kept_region(net: TinyNet, schedule: VariancePreserving) -> None:
    sigmas = get_sigmas_lcm(schedule, 4)
    noise = initial_noise([3], SHAPE)
    kept, mask = image_latents(), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    seen: list[tuple[Tensor, Tensor]] = []
    denoiser = ConsistencyDenoiser(net, Diffusion(schedule))

    def recording(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x, sigma))
        return denoiser(x, sigma)

    def run(sampler: Any, mask: Tensor, kept: Tensor = kept) -> Tensor:
        x = initial_latents(noise, sigmas[0])
        model = inpaint(recording, kept, mask, noise)
        return sampler(model, x, sigmas, noise_sampler=seeded_noise_sampler([3], SHAPE), disable=True)

    for sampler in (sample_lcm, sample_euler, sample_dpmpp_2m, sample_dpm_2m):
        seen.clear()
        result = run(sampler, mask)
        assert torch.equal(result[..., :4], kept[..., :4])
        for x, sigma in seen:  # the network sees the kept region at the right noise level
            torch.testing.assert_close(x[..., :4], kept[..., :4] + sigma * noise[..., :4])
        # the repainted region must fit what is kept, so it depends on it
        assert not torch.allclose(run(sampler, mask, kept * 2)[..., 4:], result[..., 4:])
        x = initial_latents(noise, sigmas[0])
        free = sampler(denoiser, x, sigmas, noise_sampler=seeded_noise_sampler([3], SHAPE), disable=True)
        torch.testing.assert_close(run(sampler, torch.ones_like(mask)), free)
        torch.testing.assert_close(run(sampler, torch.zeros_like(mask)), kept)


@pytest.mark.parametrize("gamma", [-0.1, 1.5, float("nan")])
def test_gamma_out_of_range_is_accepted(gamma: float) -> None:
    with pytest.raises(InputError, match=r"gamma=.*\[0, 1\]"):
        sample_tcd(lambda x, sigma: x, torch.zeros(1, 1), torch.tensor([1.0, 0.0]), gamma=gamma)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sigmas", [[1.0, 2.0, 0.0], [2.0, 2.0, 0.0], [float("nan"), 1.0, 0.0]])
def test_rising_sigmas_are_accepted(sampler: Any, sigmas: list[float]) -> None:
    with pytest.raises(InputError, match="fall strictly"):
        sampler(lambda x, sigma: x, torch.zeros(1, 1), torch.tensor(sigmas), disable=True)
