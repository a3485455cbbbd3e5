"""The distillation loss against a second implementation in float64, written from arXiv 2310.04378 alone."""

import itertools
import math
import operator

import pytest
import torch

from lcm_core.schedule import get_alphas_cumprod
from trainer.lcd import LCDConfig, draw_guidance, draw_timesteps, interpolate_abar, lcd_loss

SHAPE = (5, 4, 3, 2)


def _network(seed: int):
    """A smooth function of everything that a U-Net is given, with weights of its own."""
    weights = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def call(x, t, context, w=None):
        per_sample = (t.double() / 300).sin() * weights[0] + context.mean((1, 2)) * weights[1]
        if w is not None:
            per_sample = per_sample + 0.1 * w * weights[2]
        return (x * weights[3] + per_sample.view(-1, 1, 1, 1)).tanh()

    return call


BETAS = [(math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2 for i in range(1000)]
ABAR = list(itertools.accumulate((1 - beta for beta in BETAS), operator.mul))


def _abar(t: float) -> float:
    low = min(int(t), 998)
    log_sigma = [0.5 * math.log((1 - ABAR[i]) / ABAR[i]) for i in (low, low + 1)]
    value = log_sigma[0] + (t - low) * (log_sigma[1] - log_sigma[0])
    return 1 / (1 + math.exp(2 * value))


def _prediction(output, x, abar, kind):
    """(x0, eps) from the three kinds of output."""
    signal, noise = math.sqrt(abar), math.sqrt(1 - abar)
    if kind == "epsilon":
        return (x - noise * output) / signal, output
    if kind == "v_prediction":
        return signal * x - noise * output, signal * output + noise * x
    return output, (x - signal * output) / noise


def _f(network, x, t, context, w, kind):
    """Eq. 9 with sigma_data 0.5 and timestep scaling 10, one sample."""
    x0, _ = _prediction(network(x, torch.tensor([t]), context, w), x, _abar(t), kind)
    scaled = 10.0 * t
    return 0.25 / (scaled**2 + 0.25) * x + scaled / math.sqrt(scaled**2 + 0.25) * x0


def _teacher_eps(teacher, x, t, context, null, w, kind):
    eps = [_prediction(teacher(x, torch.tensor([t]), c), x, _abar(t), kind)[1] for c in (context, null)]
    return (1 + w) * eps[0] - w * eps[1]


def _jump(teacher, x, t, s, context, null, w, config):
    """DDIM (arXiv 2010.02502 Eq. 12), or DPM-Solver++(2S) with r = 1/2 (arXiv 2211.01095 Alg. 1)."""
    kind = config.prediction_type
    eps = _teacher_eps(teacher, x, t, context, null, w, kind)
    x0 = (x - math.sqrt(1 - _abar(t)) * eps) / math.sqrt(_abar(t))
    if config.solver == "ddim":
        return math.sqrt(_abar(s)) * x0 + math.sqrt(1 - _abar(s)) * eps
    lam = [0.5 * math.log(_abar(v) / (1 - _abar(v))) for v in (t, s)]
    half = (lam[0] + lam[1]) / 2
    h = lam[1] - lam[0]
    abar_mid = 1 / (1 + math.exp(-2 * half))
    sigma = [math.sqrt(1 - _abar(v)) for v in (t, s)]
    u = math.sqrt(1 - abar_mid) / sigma[0] * x - math.sqrt(abar_mid) * math.expm1(-h / 2) * x0
    low, high = s, t
    for _ in range(200):  # the timestep whose lambda is the midpoint's
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * math.log(_abar(middle) / (1 - _abar(middle))) > half else (low, middle)
    eps_mid = _teacher_eps(teacher, u, middle, context, null, w, kind)
    x0_mid = (u - math.sqrt(1 - abar_mid) * eps_mid) / math.sqrt(abar_mid)
    return sigma[1] / sigma[0] * x - math.sqrt(_abar(s)) * math.expm1(-h) * x0_mid


def _reference_loss(online, target, teacher, x0, context, null, config, generator):
    t, s = draw_timesteps(len(x0), config, 1000, generator)
    w = draw_guidance(len(x0), config, generator)
    eps = torch.randn(x0.shape, generator=generator).double()
    total = 0.0
    for i in range(len(x0)):
        ti, si, wi, c = int(t[i]), int(s[i]), w[i : i + 1].double(), context[i : i + 1]
        x_t = math.sqrt(_abar(ti)) * x0[i : i + 1] + math.sqrt(1 - _abar(ti)) * eps[i : i + 1]
        x_s = _jump(teacher, x_t, ti, si, c, null, float(wi), config)
        kind = config.prediction_type
        difference = _f(online, x_t, ti, c, wi, kind) - _f(target, x_s, si, c, wi, kind)
        if config.loss == "l2":
            total += float((difference**2).mean())
        elif config.loss == "huber":
            total += float(((difference**2 + config.huber_c**2).sqrt() - config.huber_c).mean())
        else:
            total += float((1 + difference**2 / (2 * config.huber_c**2)).log().mean())
    return total / len(x0)


@pytest.mark.parametrize("loss", ["l2", "huber", "cauchy"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2s"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_loss_equals_the_paper(loss, solver, kind):
    config = LCDConfig(loss=loss, solver=solver, prediction_type=kind, huber_c=0.01, w_min=1, w_max=9)
    draw = torch.Generator().manual_seed(0)
    x0 = torch.randn(SHAPE, generator=draw, dtype=torch.float64)
    context = torch.randn(5, 7, 3, generator=draw, dtype=torch.float64)
    null = torch.randn(1, 7, 3, generator=draw, dtype=torch.float64)
    networks = _network(1), _network(2), _network(3)
    abar = get_alphas_cumprod()
    ours = lcd_loss(*networks, x0, context, null, abar, config, torch.Generator().manual_seed(9))
    theirs = _reference_loss(*networks, x0, context, null, config, torch.Generator().manual_seed(9))
    assert float(ours) == pytest.approx(theirs, rel=1e-6, abs=1e-9)


def test_only_the_online_network_learns():
    weights = [torch.nn.Parameter(torch.tensor(0.5)) for _ in range(3)]
    networks = [lambda x, t, c, w=None, p=p: x * p for p in weights]
    x0, context = torch.randn(SHAPE), torch.randn(5, 7, 3)
    lcd_loss(
        *networks, x0, context, context[:1], get_alphas_cumprod().float(), LCDConfig(), torch.Generator().manual_seed(0)
    ).backward()
    assert weights[0].grad is not None
    assert weights[1].grad is None
    assert weights[2].grad is None


def test_timesteps_lie_on_the_grid_one_skip_apart():
    t, s = draw_timesteps(4096, LCDConfig(), 1000, torch.Generator().manual_seed(0))
    assert sorted(set(t.tolist())) == list(range(19, 1000, 20))
    torch.testing.assert_close(s, torch.where(t == 19, 0, t - 20))


def test_a_fractional_timestep_has_the_alphas_cumprod_that_samplers_use():
    t = torch.tensor([0.0, 17.5, 998.0, 999.0], dtype=torch.float64)
    expected = torch.tensor([_abar(float(v)) for v in t], dtype=torch.float64)
    torch.testing.assert_close(interpolate_abar(get_alphas_cumprod(), t), expected)
