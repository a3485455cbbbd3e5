"""Networks that are told where a jump ends."""

import pytest
import torch

from lcm_core.diffusion.consistency import Denoiser
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.flow_map import told_ends
from lcm_core.diffusion.grids import get_sigmas_lcm
from lcm_core.diffusion.process import RectifiedFlow, VariancePreserving
from lcm_core.diffusion.samplers import initial_latents, sample_tcd

SPREAD = 0.3
PROCESSES = {"epsilon": VariancePreserving(), "flow": RectifiedFlow(shift=3.0)}


def _exact(process, kind):
    """The exact flow map of data N(0, SPREAD^2): on the ODE's trajectories x / sqrt(a^2 SPREAD^2 + b^2) is constant."""

    def network(x, t, end):
        (a, b), (a_end, b_end) = (
            [part.double().view(-1, 1) for part in process.coefficients(at)] for at in (t, end * 1000)
        )
        landed = x * ((a_end * SPREAD) ** 2 + b_end**2).sqrt() / ((a * SPREAD) ** 2 + b**2).sqrt()
        # a_end x0 + b_end eps = landed and a x0 + b eps = x, solved for both
        eps = (a * landed - a_end * x) / (a * b_end - a_end * b)
        x0 = (b * landed - b_end * x) / (b * a_end - b_end * a)
        return eps if kind == "epsilon" else eps - x0

    return network


@pytest.mark.parametrize("kind", PROCESSES)
def test_an_exact_flow_map_ends_in_the_same_place_in_any_number_of_steps(kind):
    """Only if each step is told the end at which the sampler then lands."""
    process = PROCESSES[kind]
    denoiser = Denoiser(_exact(process, kind), Diffusion(process, kind))
    noise = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for steps in (1, 2, 3, 4, 8):
        sigmas = get_sigmas_lcm(process, steps)
        x = initial_latents(noise, sigmas[0], None, process)
        model = told_ends(denoiser, sigmas, 0.0, process)
        found.append(sample_tcd(model, x, sigmas, gamma=0.0, disable=True, process=process))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-5)
    assert 0.2 < float(found[0].std()) < 0.4, "it is not the data's spread"


@pytest.mark.parametrize("kind", PROCESSES)
def test_with_fresh_noise_the_end_lies_below_the_next_level(kind):
    """arXiv 2402.19159 Alg. 4: the jump ends at (1 - gamma) t_next, on a whole timestep of Stable Diffusion."""
    process, told = PROCESSES[kind], []
    sigmas = get_sigmas_lcm(process, 4)

    def listen(x, sigma, end):
        told.append(1000 * float(end[0]))
        return x

    model = told_ends(listen, sigmas, 0.3, process)
    sample_tcd(model, torch.ones(2, 3), sigmas, gamma=0.3, disable=True, process=process)
    visited = process.sigma_to_t(sigmas[1:]).tolist()
    expected = [0.7 * t if kind == "flow" else int(0.7 * t + 1e-4) for t in visited]
    assert told == pytest.approx(expected, abs=1e-3)
