"""Boundary scalings and prediction types against diffusers and float64 formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lcm_core.diffusion.consistency import ConsistencyDenoiser, Denoiser
from lcm_core.diffusion.diffusion import Diffusion, boundary_scalings
from lcm_core.diffusion.process import Process, RectifiedFlow, VariancePreserving
from lcm_core.diffusion.schedule import get_alphas_cumprod
from lcm_core.errors import InputError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
ABAR = get_alphas_cumprod()
PROCESS = VariancePreserving(ABAR)


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, eps, timesteps and abar of three images."""
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 3, 4, 6, 6, generator=generator, dtype=dtype)
    timesteps = torch.tensor([999, 400, 7])
    return x0, eps, timesteps, ABAR[timesteps].to(dtype).reshape(-1, 1, 1, 1)


def prediction_of(x0: Tensor, eps: Tensor, abar: Tensor, prediction_type: str) -> Tensor:
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0  # arXiv 2202.00512 Sec. 4
    return {"epsilon": eps, "v_prediction": v, "sample": x0}[prediction_type]


@pytest.mark.parametrize(("sigma_data", "scaling"), [(0.5, 10.0), (0.5, 1.0), (1.0, 10.0)])
def test_boundary_scalings_differ_from_diffusers(sigma_data: float, scaling: float) -> None:
    from diffusers import LCMScheduler

    timesteps = torch.tensor([0, 1, 19, 259, 999])
    c_skip, c_out = boundary_scalings(timesteps, sigma_data, scaling)
    for i, t in enumerate(timesteps.tolist()):
        norm = (scaling * t) ** 2 + sigma_data**2
        torch.testing.assert_close(float(c_skip[i]), sigma_data**2 / norm)
        torch.testing.assert_close(float(c_out[i]), scaling * t / norm**0.5)
        if sigma_data == 0.5:
            expected = LCMScheduler(timestep_scaling=scaling).get_scalings_for_boundary_condition_discrete(t)
            torch.testing.assert_close((float(c_skip[i]), float(c_out[i])), expected)
    assert (float(c_skip[0]), float(c_out[0])) == (1.0, 0.0)


def test_noise_differs_from_diffusers() -> None:
    from diffusers import DDPMScheduler

    x0, eps, timesteps, _ = pair(torch.float32)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(Diffusion().noise(x0, eps, timesteps), scheduler.add_noise(x0, eps, timesteps))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_prediction_gives_another_x0_or_eps(prediction_type: str) -> None:
    x0, eps, timesteps, abar = pair()
    diffusion = Diffusion(PROCESS, prediction_type)
    x_t = diffusion.noise(x0, eps, timesteps)
    output = prediction_of(x0, eps, abar, prediction_type)
    torch.testing.assert_close(x_t, abar.sqrt() * x0 + (1 - abar).sqrt() * eps)
    torch.testing.assert_close(diffusion.x0(output, x_t, timesteps), x0)
    torch.testing.assert_close(diffusion.eps(output, x_t, timesteps), eps)
    torch.testing.assert_close(diffusion.target(x0, eps, timesteps), output)


@pytest.mark.parametrize("shape", [(3, 16, 4, 4), (3, 16, 5, 4, 4)])
def test_flow_velocity_gives_another_x0_or_eps(shape: tuple[int, ...]) -> None:
    """arXiv 2403.03206 Eq. 1 to 13 with z_t = (1 - s) x0 + s eps; pictures and video; pure noise included."""
    generator = torch.Generator().manual_seed(5)
    x0, eps = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    t = torch.tensor([1000.0, 937.5, 20.0], dtype=torch.float64)
    s = (t / 1000).reshape(-1, *[1] * (len(shape) - 1))
    diffusion = Diffusion(RectifiedFlow(), "flow")
    x_t = diffusion.noise(x0, eps, t)
    torch.testing.assert_close(x_t, (1 - s) * x0 + s * eps)
    torch.testing.assert_close(diffusion.target(x0, eps, t), eps - x0)
    torch.testing.assert_close(diffusion.x0(eps - x0, x_t, t), x0)
    torch.testing.assert_close(diffusion.eps(eps - x0, x_t, t), eps)
    torch.testing.assert_close(diffusion.f(eps - x0, x_t, t), x0)  # no boundary scalings
    end = torch.tensor([750.0, 500.0, 0.0], dtype=torch.float64)
    gap = ((end - t) / 1000).reshape(s.shape)
    output = torch.sin(x_t)
    torch.testing.assert_close(diffusion.jump(output, x_t, t, end), x_t + gap * output)  # Euler
    torch.testing.assert_close(diffusion.jump(output, x_t, t, t), x_t)
    clean = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(diffusion.f(output, x_t, clean), x_t, rtol=0, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_consistency_function_differs_from_diffusers(prediction_type: str) -> None:
    """The "denoised" of LCMScheduler.step is the paper's f."""
    from diffusers import LCMScheduler

    x0, eps, timesteps, _ = pair(torch.float32)
    diffusion = Diffusion(PROCESS, prediction_type)
    x_t = diffusion.noise(x0, eps, timesteps)
    output = torch.tanh(x_t) + 0.1 * eps
    actual = diffusion.f(output, x_t, timesteps)
    scheduler = LCMScheduler(prediction_type=prediction_type)
    for i, t in enumerate(timesteps.tolist()):
        scheduler.set_timesteps(timesteps=[t])
        expected = scheduler.step(output[i : i + 1], t, x_t[i : i + 1]).denoised
        torch.testing.assert_close(actual[i : i + 1], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_consistency_function_moves_a_clean_sample() -> None:
    """f(x, 0) = x, whatever the network says."""
    x = torch.randn(2, 4, 5, 5)
    f = Diffusion().f(torch.full_like(x, 9.0), x, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(f, x)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_denoiser_asks_the_network_wrongly(prediction_type: str) -> None:
    """In sigma space: the network must see unit-variance x and whole timesteps, each image its own."""
    x0, eps, timesteps, abar = pair()
    sigma = PROCESS.sigmas[timesteps]
    x = x0 + sigma.reshape(-1, 1, 1, 1) * eps
    seen: dict[str, Tensor] = {}

    def unet(x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        seen.update(x_t=x_t, t=t, text=text)
        return prediction_of(x0, eps, abar, prediction_type)

    denoised = Denoiser(unet, Diffusion(PROCESS, prediction_type))(x, sigma, text=timesteps)
    torch.testing.assert_close(denoised, x0)
    torch.testing.assert_close(seen["x_t"], abar.sqrt() * x0 + (1 - abar).sqrt() * eps)
    assert torch.equal(seen["t"], timesteps.double())
    assert seen["text"] is timesteps
    diffusion = Diffusion(PROCESS, prediction_type, sigma_data=0.7, timestep_scaling=0.01)
    expected = diffusion.f(prediction_of(x0, eps, abar, prediction_type), seen["x_t"], timesteps)
    torch.testing.assert_close(ConsistencyDenoiser(unet, diffusion)(x, sigma, text=timesteps), expected)


def test_denoiser_asks_a_flow_wrongly() -> None:
    """The network must see the sampler's x as it is, and timesteps of 1000 sigma."""
    x = torch.randn(2, 16, 3, 4, 4)
    sigma = torch.tensor([1.0, 0.375])
    seen: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen.extend((x_t, t))
        return torch.cos(x_t)

    for kind in (Denoiser, ConsistencyDenoiser):
        denoised = kind(network, Diffusion(RectifiedFlow(), "flow"))(x, sigma)
        torch.testing.assert_close(denoised, x - sigma.reshape(-1, 1, 1, 1, 1) * torch.cos(x))
    assert torch.equal(seen[0], x)
    assert seen[1].tolist() == [1000.0, 375.0]


def test_denoiser_in_bfloat16_blurs_the_timestep() -> None:
    seen: list[Tensor] = []

    def unet(x_t: Tensor, t: Tensor) -> Tensor:
        seen.extend((x_t, t))
        return x_t

    x = torch.randn(2, 4, 4, 4).bfloat16()
    sigma = PROCESS.sigmas[[759, 259]].float()
    denoised = Denoiser(unet, Diffusion())(x, sigma)
    assert seen[0].dtype == denoised.dtype == torch.bfloat16
    assert seen[1].tolist() == [759, 259]
    expected = Denoiser(lambda x_t, t: x_t, Diffusion())(x.float(), sigma)
    torch.testing.assert_close(denoised.float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_one_sigma_for_all_images_is_refused() -> None:
    x = torch.randn(3, 4, 4, 4)
    denoiser = ConsistencyDenoiser(lambda x_t, t: x_t * t.reshape(-1, 1, 1, 1).cos(), Diffusion())
    torch.testing.assert_close(denoiser(x, torch.tensor(2.0)), denoiser(x, torch.full((3,), 2.0)))


def test_gradient_does_not_reach_the_network() -> None:
    """Fine-tuning through the denoiser needs it."""
    weight = torch.nn.Parameter(torch.tensor(0.3))
    x = torch.randn(2, 4, 4, 4)
    denoiser = ConsistencyDenoiser(lambda x_t, t: x_t * weight, Diffusion())
    denoiser(x, torch.full((2,), 2.0)).sum().backward()
    expected = -2.0 * x.sum() / 5**0.5  # d(x - sigma out)/d weight; c_out is 1 to 1e-7 there
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("process", "prediction_type", "message"),
    [
        (PROCESS, "velocity", "unknown prediction_type 'velocity'; choose epsilon"),
        (PROCESS, "flow", "'flow' does not go with a variance-preserving process; use 'epsilon'"),
        (RectifiedFlow(), "epsilon", "'epsilon' does not go with a flow process; use 'flow'"),
    ],
)
def test_a_prediction_type_that_does_not_fit_is_accepted(process: Process, prediction_type: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Diffusion(process, prediction_type)


def test_epsilon_with_zero_terminal_snr_is_accepted() -> None:
    process = VariancePreserving(get_alphas_cumprod(zero_terminal_snr=True))
    with pytest.raises(InputError, match="'epsilon' is undefined on a zero-terminal-SNR schedule; use 'v_prediction'"):
        Diffusion(process)


def test_an_impossible_grid_is_accepted() -> None:
    with pytest.raises(InputError, match="original_steps=1001 must be 1 to 1000"):
        Diffusion(original_steps=1001)
