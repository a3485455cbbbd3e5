"""Samplers against diffusers' schedulers: same weights, same noise, float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lcm_core.diffusion.consistency import ConsistencyDenoiser, Denoiser
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_sigmas_lcm, get_sigmas_leading, get_sigmas_linspace, get_sigmas_trailing
from lcm_core.diffusion.guidance import guide
from lcm_core.diffusion.process import Process, RectifiedFlow, VariancePreserving
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

SHAPE = (4, 8, 8)
SEED = 11
STEPS = (1, 2, 3, 4, 5, 6, 8, 16)
STRENGTHS = (0.2, 0.35, 0.5, 0.6, 0.75, 0.9, 1.0)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SAMPLERS = (sample_lcm, sample_tcd, sample_euler, sample_dpmpp_2m, sample_dpm_2m)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class TinyNet(nn.Module):
    """A nonlinear stand-in for a U-Net: it depends on x, on t, on the text and on the guidance embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.into, self.out = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.time, self.text, self.guidance = nn.Linear(2, 8), nn.Linear(6, 8), nn.Linear(256, 8)

    def forward(
        self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor | None = None, timestep_cond: Tensor | None = None
    ) -> Tensor:
        phase = t.float().reshape(-1, 1) * torch.tensor([0.001, 0.02])
        bias = self.time(phase.sin())
        if encoder_hidden_states is not None:
            bias = bias + self.text(encoder_hidden_states.mean(1))
        if timestep_cond is not None:
            bias = bias + self.guidance(timestep_cond)
        return self.out(torch.tanh(self.into(x) + bias[:, :, None, None]))


@pytest.fixture(scope="module")
def net() -> TinyNet:
    return TinyNet().requires_grad_(False)


@pytest.fixture(scope="module")
def schedule() -> VariancePreserving:
    return VariancePreserving(get_alphas_cumprod())


def image_latents() -> Tensor:
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(99))


def reference(scheduler: Any, net: nn.Module, strength: float = 1.0, **step_args: Any) -> Tensor:
    """diffusers' own loop; the generator gives the first latents and then the noise of each step."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(1, *SHAPE, generator=generator)
    if strength < 1:
        x = scheduler.add_noise(image_latents(), x, scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x, generator=generator, **step_args).prev_sample
    return x


def ours(sampler: Callable[..., Tensor], model: Any, sigmas: Tensor, strength: float = 1.0, **args: Any) -> Tensor:
    x0 = image_latents() if strength < 1 else None
    x = initial_latents(initial_noise([SEED], SHAPE), sigmas[0], x0, args.get("process"))
    return sampler(model, x, sigmas, noise_sampler=seeded_noise_sampler([SEED], SHAPE), disable=True, **args)


def assert_parity(actual: Tensor, expected: Tensor, bar: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=bar * float(expected.abs().max()))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", STEPS)
def test_lcm_differs_from_diffusers(net: TinyNet, schedule: VariancePreserving, steps: int, prediction: str) -> None:
    from diffusers import LCMScheduler

    model = ConsistencyDenoiser(net, Diffusion(schedule, prediction))
    compared = 0
    for strength in STRENGTHS:
        scheduler = LCMScheduler(prediction_type=prediction)
        if int(50 * strength) < steps:  # refused by both
            with pytest.raises(ValueError, match=str(steps)):
                scheduler.set_timesteps(steps, strength=strength)
            with pytest.raises(InputError, match=rf"{steps} steps at strength={strength}.*original_steps=50"):
                get_sigmas_lcm(schedule, steps, strength=strength)
            continue
        scheduler.set_timesteps(steps, strength=strength)
        expected = reference(scheduler, net, strength)
        assert_parity(ours(sample_lcm, model, get_sigmas_lcm(schedule, steps, 50, strength), strength), expected, 1e-5)
        compared += 1
    assert compared >= 6


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_differs_from_diffusers(net: TinyNet, schedule: VariancePreserving, gamma: float, prediction: str) -> None:
    from diffusers import TCDScheduler

    model = Denoiser(net, Diffusion(schedule, prediction))
    for steps in STEPS:
        for strength in STRENGTHS:
            if int(50 * strength) < steps:
                continue
            scheduler = TCDScheduler(prediction_type=prediction)
            scheduler.set_timesteps(steps, strength=strength)
            expected = reference(scheduler, net, strength, eta=gamma)
            sigmas = get_sigmas_lcm(schedule, steps, 50, strength)
            assert_parity(ours(sample_tcd, model, sigmas, strength, gamma=gamma), expected, 1e-5)


def test_custom_grids_differ_from_diffusers(net: TinyNet, schedule: VariancePreserving) -> None:
    """Custom timesteps, or another original_steps, would run on a wrong grid. 100 serves 16 steps at strength 0.2."""
    from diffusers import LCMScheduler, TCDScheduler

    custom = [999, 700, 421, 250, 10]
    for kind, sampler, model in (
        (LCMScheduler, sample_lcm, ConsistencyDenoiser(net, Diffusion(schedule))),
        (TCDScheduler, sample_tcd, Denoiser(net, Diffusion(schedule))),
    ):
        scheduler = kind()
        scheduler.set_timesteps(timesteps=custom)
        expected = reference(scheduler, net)
        assert_parity(ours(sampler, model, get_sigmas_lcm(schedule, None, timesteps=custom)), expected, 1e-5)
    scheduler = LCMScheduler(original_inference_steps=100)
    scheduler.set_timesteps(16, strength=0.2)
    expected = reference(scheduler, net, 0.2)
    model = ConsistencyDenoiser(net, Diffusion(schedule))
    assert_parity(ours(sample_lcm, model, get_sigmas_lcm(schedule, 16, 100, 0.2), 0.2), expected, 1e-5)


def test_tcd_jumps_land_on_diffusers_timesteps(schedule: VariancePreserving) -> None:
    """floor((1 - gamma) t) in another precision than diffusers' float32 would land one timestep off."""
    grid = torch.arange(999, 0, -1)
    for gamma in (0.05, 0.1, 0.2, 0.3, 0.45, 0.5, 0.7, 0.75, 0.9, 0.99, 1.0):
        landed: list[float] = []

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            return torch.zeros_like(x)

        for i in range(0, 998, 7):
            sigmas = get_sigmas_lcm(schedule, None, timesteps=grid[[i, i + 1]])
            # With denoised 0 and noise 0 the first step scales x by sigma_s / sigma.
            kept: list[Tensor] = []
            sample_tcd(
                model,
                torch.ones(1, 1, dtype=torch.float64),
                sigmas,
                callback=lambda state, kept=kept: kept.append(state["x"]),
                disable=True,
                noise_sampler=lambda *_: torch.zeros(1, 1, dtype=torch.float64),
                gamma=gamma,
            )
            landed.append(float(schedule.sigma_to_t(kept[1].flatten() * sigmas[0].double())))
        expected = torch.floor((1 - gamma) * grid[1:998:7][: len(landed)])
        torch.testing.assert_close(torch.tensor(landed), expected, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [2, 4, 5, 10, 20, 25])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler_differs_from_ddim(net: TinyNet, schedule: VariancePreserving, steps: int, prediction: str) -> None:
    """On grids whose gaps are T // N, as DDIMScheduler assumes."""
    from diffusers import DDIMScheduler

    for spacing, grid in (("leading", get_sigmas_leading), ("trailing", get_sigmas_trailing)):
        scheduler = DDIMScheduler(
            **BETAS, clip_sample=False, steps_offset=1, timestep_spacing=spacing, prediction_type=prediction
        )
        scheduler.set_timesteps(steps)
        expected = reference(scheduler, net)
        actual = ours(sample_euler, Denoiser(net, Diffusion(schedule, prediction)), grid(schedule, steps))
        assert_parity(actual, expected, 1e-4)


@pytest.mark.parametrize("steps", [2, 3, 7, 12, 30])
def test_euler_differs_from_ddim_on_uneven_grids(net: TinyNet, schedule: VariancePreserving, steps: int) -> None:
    """DDIMScheduler jumps by T // N even where its linspace or trailing grid has other gaps, so its step is asked on a
    chain that has the grid's noise levels only."""
    from diffusers import DDIMScheduler

    for spacing, get_sigmas in (("linspace", get_sigmas_linspace), ("trailing", get_sigmas_trailing)):
        full = DDIMScheduler(**BETAS, timestep_spacing=spacing)
        full.set_timesteps(steps)
        abar = get_alphas_cumprod()[full.timesteps.flip(0)]
        betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
        scheduler = DDIMScheduler(trained_betas=betas.tolist(), num_train_timesteps=steps, clip_sample=False)
        scheduler.set_timesteps(steps)
        expected = reference(scheduler, lambda x, i, full=full: net(x, full.timesteps.flip(0)[i]))  # type: ignore[arg-type]
        assert_parity(
            ours(sample_euler, Denoiser(net, Diffusion(schedule)), get_sigmas(schedule, steps)), expected, 1e-4
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 5, 9, 10, 14, 15, 20, 25])
def test_dpmpp_2m_differs_from_diffusers(
    net: TinyNet, schedule: VariancePreserving, steps: int, prediction: str
) -> None:
    from diffusers import DPMSolverMultistepScheduler

    grids = {
        "leading": get_sigmas_leading(schedule, steps, drop_last=True),
        "linspace": get_sigmas_linspace(schedule, steps, drop_last=True),
        "trailing": get_sigmas_trailing(schedule, steps),
    }
    for spacing, sigmas in grids.items():
        scheduler = DPMSolverMultistepScheduler(
            **BETAS, steps_offset=1, timestep_spacing=spacing, prediction_type=prediction
        )
        assert (scheduler.config.solver_order, scheduler.config.solver_type) == (2, "midpoint")
        scheduler.set_timesteps(steps)
        expected = reference(scheduler, net)
        assert_parity(ours(sample_dpmpp_2m, Denoiser(net, Diffusion(schedule, prediction)), sigmas), expected, 1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25])
def test_dpm_2m_differs_from_diffusers(net: TinyNet, schedule: VariancePreserving, steps: int, prediction: str) -> None:
    """diffusers' ends at timestep 0, and in variance-preserving coordinates."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        **BETAS,
        algorithm_type="dpmsolver",
        final_sigmas_type="sigma_min",
        lower_order_final=False,
        timestep_spacing="trailing",
        prediction_type=prediction,
    )
    scheduler.set_timesteps(steps)
    expected = reference(scheduler, net)
    sigmas = get_sigmas_trailing(schedule, steps)
    sigmas[-1] = schedule.sigmas[0]
    actual = ours(sample_dpm_2m, Denoiser(net, Diffusion(schedule, prediction)), sigmas) / (1 + sigmas[-1] ** 2).sqrt()
    assert_parity(actual, expected, 1e-4)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_not_exact(net: TinyNet, steps: int, prediction: str) -> None:
    """From pure noise, without a stand-in for the infinite sigma."""
    from diffusers import LCMScheduler

    process = VariancePreserving(get_alphas_cumprod(zero_terminal_snr=True))
    scheduler = LCMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True)
    scheduler.alphas_cumprod = process.alphas_cumprod.float()  # diffusers' own are good to 1e-4 only
    scheduler.set_timesteps(steps)
    model = ConsistencyDenoiser(net, Diffusion(process, prediction))
    actual = ours(sample_lcm, model, get_sigmas_lcm(process, steps), process=process)
    assert_parity(actual, reference(scheduler, net), 1e-6)


@pytest.mark.parametrize("sampler", [sample_lcm, sample_tcd, sample_euler])  # the others look back, over an infinite h
def test_zero_terminal_snr_gives_another_picture_than_its_limit(net: TinyNet, sampler: Any) -> None:
    """In the scale x_t = a x0 + b eps every sampler does what it does in x0 + sigma eps, whose last sigma is finite."""
    exact = VariancePreserving(get_alphas_cumprod(zero_terminal_snr=True))
    noise = initial_noise([SEED + 1], SHAPE).double()
    limit = exact.alphas_cumprod.clone()
    limit[-1] = 1e-11
    pictures = []
    for process in (exact, VariancePreserving(limit)):
        kind = ConsistencyDenoiser if sampler is sample_lcm else Denoiser
        model = kind(lambda x, t: net(x.float(), t).double(), Diffusion(process, "v_prediction"))
        x = initial_latents(initial_noise([SEED], SHAPE).double(), get_sigmas_trailing(process, 6)[0], process=process)
        sigmas = torch.cat([process.sigmas[[999, 800, 500, 200, 40]], torch.zeros(1, dtype=torch.float64)])
        pictures.append(sampler(model, x, sigmas, disable=True, noise_sampler=lambda *_: noise, process=process))
    assert_parity(pictures[0], pictures[1], 2e-5)


def flow_reference(scheduler: Any, net: nn.Module, sigmas: list[float]) -> Tensor:
    """diffusers' own loop for a velocity network."""
    scheduler.set_timesteps(sigmas=sigmas)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(1, *SHAPE, generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["FlowMatchLCMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_flow_differs_from_diffusers(net: TinyNet, name: str, steps: int, shift: float) -> None:
    """From pure noise, at 1e-6 relative."""
    import diffusers

    flow = RectifiedFlow(shift)
    sampler = sample_lcm if name == "FlowMatchLCMScheduler" else sample_euler
    expected = flow_reference(getattr(diffusers, name)(shift=shift), net, [1 - i / steps for i in range(steps)])
    model = ConsistencyDenoiser(net, Diffusion(flow, "flow"))
    actual = ours(sampler, model, get_sigmas_lcm(flow, steps), process=flow)
    assert_parity(actual, expected, 1e-6)


@pytest.mark.parametrize("shape", [(2, 16, 6, 6), (2, 16, 5, 6, 6)])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_on_a_flow_leaves_the_noise_process(shape: tuple[int, ...], steps: int, gamma: float) -> None:
    """With the true velocity of one known picture, x must hold (1 - s) x0 and noise of spread s at every step."""
    flow, x0 = RectifiedFlow(3.0), 2.0
    sigmas = get_sigmas_lcm(flow, steps)
    generator = torch.Generator().manual_seed(0)
    seen: list[Tensor] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return torch.full_like(x, x0)

    big = (400, *shape[1:])
    x = initial_latents(torch.randn(big, generator=generator), sigmas[0], process=flow)
    end = sample_tcd(
        model,
        x,
        sigmas,
        disable=True,
        process=flow,
        gamma=gamma,
        noise_sampler=lambda *_: torch.randn(big, generator=generator),
    )
    torch.testing.assert_close(end, torch.full_like(end, x0))
    for x_s, s in zip(seen, sigmas.tolist(), strict=False):
        assert float(x_s.mean()) == pytest.approx((1 - s) * x0, abs=0.01)
        assert float(x_s.std()) == pytest.approx(s, abs=0.01)


def test_tcd_on_a_flow_is_not_euler_at_gamma_0_nor_lcm_at_gamma_1(net: TinyNet) -> None:
    flow = RectifiedFlow(3.0)
    sigmas, model = get_sigmas_lcm(flow, 4), Denoiser(net, Diffusion(flow, "flow"))
    euler, lcm = (ours(sampler, model, sigmas, process=flow) for sampler in (sample_euler, sample_lcm))
    assert_parity(ours(sample_tcd, model, sigmas, process=flow, gamma=0.0), euler, 1e-6)
    assert_parity(ours(sample_tcd, model, sigmas, process=flow, gamma=1.0), lcm, 1e-6)


@pytest.mark.parametrize("process", [RectifiedFlow(3.0), VariancePreserving()])
def test_picture_to_picture_begins_at_another_noise_level(process: Process) -> None:
    """x = a x0 + b noise at the sampler's scale; a mask keeps the known part at it in every step."""
    x0, noise = torch.full((2, 4, 3, 3), 2.0), torch.randn(2, 4, 3, 3)
    sigma = get_sigmas_lcm(process, 4, strength=0.5)[0]
    a = 1 - sigma if isinstance(process, RectifiedFlow) else 1.0
    torch.testing.assert_close(initial_latents(noise, sigma, x0, process), a * x0 + sigma * noise)
    mask = torch.zeros(1, 1, 3, 3)
    mask[..., 0] = 1
    seen: list[Tensor] = []
    model = inpaint(lambda x, sigma: seen.append(x) or torch.zeros_like(x), x0, mask, noise, process)  # type: ignore[func-returns-value]
    kept = model(torch.zeros_like(x0), sigma.expand(2))
    torch.testing.assert_close(seen[0][..., 1:], (a * x0 + sigma * noise)[..., 1:])
    torch.testing.assert_close(kept[..., 1:], x0[..., 1:])
    assert not kept[..., 0].any()


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
