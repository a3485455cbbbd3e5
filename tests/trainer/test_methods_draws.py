"""What each method draws, and what its settings may be."""

import math
from dataclasses import asdict

import pytest
import torch

from lcm_core.diffusion import solver
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_timesteps_lcm
from lcm_core.diffusion.process import VariancePreserving
from lcm_core.diffusion.schedule import get_alphas_cumprod
from lcm_core.diffusion.solver import solver_jump
from lcm_core.errors import InputError
from tests.trainer.test_methods import ABAR, FLOW, SHAPE, _abar, _config, _diffusion, _loss, _sample
from trainer.data.cache import Batch
from trainer.methods.config import (
    METHOD_CONFIGS,
    SOLVERS,
    defaults_of,
    method_config,
)
from trainer.methods.method import get_method, make_sample
from trainer.methods.segmented import phase_edges
from trainer.methods.shared import draw_noise, draw_pair, each, guided_teacher, snr_weight


def _pair(size, **settings):
    config = _config(**settings)
    points = get_method(config).draw(size, config, _diffusion(config), torch.Generator().manual_seed(0))
    return points.t, points.s, points.end


def test_timesteps_lie_on_the_grid_one_skip_apart():
    t, s, _ = _pair(4096)
    assert sorted(set(t.tolist())) == list(range(19, 1000, 20))
    torch.testing.assert_close(s, torch.where(t == 19, 0, t - 20))


def test_jitter_reaches_every_timestep():
    t, s, _ = _pair(40000, grid_jitter=True)
    assert sorted(set(t.tolist())) == list(range(1000))
    torch.testing.assert_close(s, (t - 20).clamp(min=0))


def test_lognormal_timesteps_follow_the_normal_distribution_of_log_sigma():
    t, *_ = _pair(200_000, timestep_sampling="lognormal")
    edges = [0.5 * math.log((1 - ABAR[v]) / ABAR[v]) for v in [0, *range(19, 1000, 20)]]
    normal = torch.distributions.Normal(-1.1, 2.0)
    shares = normal.cdf(torch.tensor(edges)).diff()
    shares = shares / shares.sum()
    found = torch.bincount(t // 20, minlength=50) / len(t)
    torch.testing.assert_close(found, shares, rtol=0, atol=0.005)


def test_lognormal_timesteps_of_a_flow_follow_log_of_noise_by_signal():
    config = _config(timestep_sampling="lognormal")
    t = draw_pair(200_000, config, _diffusion(config, "flow"), torch.Generator().manual_seed(0)).t
    grid = FLOW.process.grid(torch.arange(51), 50)
    normal = torch.distributions.Normal(-1.1, 2.0)
    shares = normal.cdf((grid / (1000 - grid)).log().nan_to_num(neginf=-1e9, posinf=1e9)).diff()
    found = torch.bincount(torch.searchsorted(grid, t - 1e-6) - 1, minlength=50) / len(t)
    torch.testing.assert_close(found.double(), shares, rtol=0, atol=0.005)


def test_tcd_ends_anywhere_between_zero_and_the_jump():
    _, s, end = _pair(200_000, kind="tcd")
    assert (end <= s).all()
    ends = end[s == 19]
    torch.testing.assert_close(torch.bincount(ends) / len(ends), torch.full((20,), 1 / 20), rtol=0, atol=0.02)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_tcd_ends_at_the_clean_picture(share):
    """1 is the plain consistency loss's choice; what does not end there ends anywhere, as without the option."""
    _, s, end = _pair(200_000, kind="tcd", clean_share=share)
    ends = end[s == 979]
    expected = torch.full((980,), (1 - share) / 980)
    expected[0] += share
    torch.testing.assert_close(torch.bincount(ends, minlength=980) / len(ends), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("phases", [1, 2, 3, 4, 8, 50])
def test_phases_end_where_a_sampler_of_as_many_steps_looks(phases):
    edges = phase_edges(_config("segmented", phases=phases), Diffusion())
    visited = get_timesteps_lcm(phases).flip(0)[:-1]
    torch.testing.assert_close(edges, torch.cat([torch.zeros(1, dtype=torch.int64), visited]))


def test_no_segmented_jump_leaves_its_phase():
    t, s, end = _pair(4000, kind="segmented", phases=4, grid_jitter=True)
    edges = torch.tensor([-1, 259, 499, 759, 999])
    phase = torch.bucketize(t, edges)
    torch.testing.assert_close(end, edges[phase - 1].clamp(min=0))
    assert (s >= end).all()


@pytest.mark.parametrize("method", ["tcd", "dmd2"])
def test_each_process_draws_its_rows_of_what_one_would_draw(method):
    config = _config(method, noise_offset=0.1)
    x0, diffusion = torch.arange(8.0).view(8, 1, 1, 1), _diffusion(config)
    whole = make_sample(Batch(x0, {}, {}), config, diffusion, torch.Generator().manual_seed(3))
    part = make_sample(Batch(x0[5:7], {}, {}), config, diffusion, torch.Generator().manual_seed(3), 8, 5)
    expected = whole.part(slice(5, 7))
    for name in ("x0", "eps", "w"):
        torch.testing.assert_close(getattr(part, name), getattr(expected, name), rtol=0, atol=0)
    torch.testing.assert_close(asdict(part.points), asdict(expected.points), rtol=0, atol=0)


def test_snr_weights():
    """min(SNR, gamma) and max(SNR, 1); a weight multiplies its own sample's loss."""
    snr = torch.tensor([9.0, 1.0, 1 / 9])
    torch.testing.assert_close(snr_weight(snr, _config(weighting="min_snr")), snr.clamp(max=5))
    torch.testing.assert_close(snr_weight(snr, _config(weighting="truncated_snr")), snr.clamp(min=1))
    config = _config(weighting="min_snr")
    sample = _sample(config)
    losses = [_loss(c, sample) for c in (_config(), config)]
    weights = [min(ABAR[t] / (1 - ABAR[t]), 5.0) for t in sample.points.t.tolist()]
    torch.testing.assert_close(losses[1], losses[0] * torch.tensor(weights, dtype=torch.float64))


def test_noise_offset_moves_whole_channels():
    eps = draw_noise(torch.Size((64, 4, 16, 16)), _config(noise_offset=2.0), torch.Generator().manual_seed(0))
    plain = draw_noise(torch.Size((64, 4, 16, 16)), _config(), torch.Generator().manual_seed(0))
    offsets = eps - plain
    torch.testing.assert_close(offsets, offsets[:, :, :1, :1].expand_as(offsets), rtol=0, atol=1e-5)
    assert float(offsets[:, :, 0, 0].std()) == pytest.approx(2.0, rel=0.15)


def test_the_jump_from_zero_terminal_snr_is_exact():
    """At t = 999 there is no signal: x_s must be as good in float32 as anywhere else."""
    config = _config(w_min=7.0, w_max=7.0)
    process = VariancePreserving(get_alphas_cumprod(zero_terminal_snr=True))
    diffusion = Diffusion(process, "v_prediction")
    t, s = torch.full((5,), 999), torch.full((5,), 979)
    jumps = []
    for dtype in (torch.float64, torch.float32):
        sample = each(_sample(config), lambda v, dtype=dtype: v.to(dtype) if v.is_floating_point() else v)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4)).to(dtype)
        teacher = lambda x, t, c, w: x.mul(0.5).cos()  # noqa: E731
        jumps.append(solver_jump(diffusion, guided_teacher(teacher, sample), x, t, s).double())
    torch.testing.assert_close(jumps[1], jumps[0], rtol=0, atol=2e-6)


def test_a_fractional_timestep_has_the_coefficients_that_samplers_use():
    t = torch.tensor([0.0, 17.5, 998.0, 999.0], dtype=torch.float64)
    expected = torch.tensor([_abar(float(v)) for v in t], dtype=torch.float64)
    a, b = Diffusion().process.coefficients(t)
    torch.testing.assert_close(a**2, expected)
    torch.testing.assert_close(b**2, 1 - expected)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("magic", {}, "unknown method 'magic'"),
        ("lcd", {"loss": "l3"}, "unknown loss 'l3'"),
        ("lcd", {"weighting": "heavy"}, "unknown weighting 'heavy'"),
        ("lcd", {"timestep_sampling": "odd"}, "unknown timestep_sampling 'odd'"),
        ("lcd", {"solver": "euler"}, "unknown solver 'euler'"),
        ("lcd", {"original_steps": 0}, "original_steps 0 is out of range"),
        ("lcd", {"snr_gamma": 0.0}, "snr_gamma 0.0 is out of range"),
        ("lcd", {"huber_c": -1.0}, "huber_c -1.0 is out of range"),
        ("lcd", {"w_min": -1.0}, "w_min=-1"),
        ("lcd", {"w_max": math.inf}, "w_max=inf"),
        ("lcd", {"noise_offset": math.nan}, "noise_offset nan is out of range"),
        ("segmented", {"phases": 51}, "phases=51"),
        ("dmd2", {"phases": 0}, "phases=0"),
        ("dmd2", {"critic_updates": 0}, "critic_updates 0 is out of range"),
        ("tcd", {"clean_share": 1.5}, r"clean_share 1\.5 is out of range"),
        ("finetune", {"diffusion_weight": -1.0}, "diffusion_weight -1.0 is out of range"),
        ("lcd", {"clean_share": 5, "phases": -3}, "clean_share is not read by method lcd, but by tcd"),
        ("finetune", {"solver": "ddim"}, "solver is not read by method finetune"),
        ("dmd2", {"huber_c": 0.1}, "huber_c is not read by method dmd2, but by lcd, finetune, tcd, segmented"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_computed(kind, change, words):
    with pytest.raises(InputError, match=words):
        method_config(kind, **change)


def test_more_timesteps_than_the_schedule_has_are_refused():
    with pytest.raises(InputError, match="original_steps=1001"):
        _sample(_config(original_steps=1001))


def test_the_solvers_that_settings_may_name_are_those_that_there_are():
    assert solver.SOLVERS == SOLVERS


@pytest.mark.parametrize("kind", METHOD_CONFIGS)
def test_a_method_reads_every_setting_that_its_class_has(kind, monkeypatch):
    """A setting that is accepted and ignored misleads; those of `make_sample`, the loss and the sampler all count."""
    read = set()
    config = method_config(kind, **{"weighting": "min_snr"} if kind not in ("dmd2", "tdm") else {})

    class Watched(type(config)):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    watched = Watched(**{name: getattr(config, name) for name in defaults_of(type(config))})
    read.clear()
    _loss(watched, _sample(watched))
    assert defaults_of(type(config)).keys() <= read
