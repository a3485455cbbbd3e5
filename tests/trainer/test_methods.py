"""Every method's loss against a second implementation in float64, one sample at a time, from the papers' equations."""

import itertools
import math
import operator
from dataclasses import replace
from typing import Any

import pytest
import torch

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_timesteps_lcm
from lcm_core.diffusion.process import RectifiedFlow
from trainer.data.cache import Batch
from trainer.distill import for_method
from trainer.methods.config import (
    MethodConfig,
    method_config,
    methods_that_read,
)
from trainer.methods.method import get_method, make_sample
from trainer.methods.shared import Networks, each

SHAPE = (5, 4, 3, 2)
BETAS = [(math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2 for i in range(1000)]
ABAR = list(itertools.accumulate((1 - beta for beta in BETAS), operator.mul))
FLOW = Diffusion(RectifiedFlow(shift=3.0), "flow")


def _config(kind: str = "lcd", **settings: Any) -> MethodConfig:
    common = {"w_min": 1.0, "w_max": 9.0} | ({"huber_c": 0.01} if kind in methods_that_read("huber_c") else {})
    return method_config(kind, **(common | settings))


def _diffusion(config: MethodConfig, kind: str = "epsilon") -> Diffusion:
    return for_method(FLOW if kind == "flow" else Diffusion(prediction_type=kind), config)


def _network(seed: int):
    """A smooth function of everything that a U-Net is given, with weights of its own."""
    weights = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def call(x, t, conditioning, w):
        per_sample = (t.double() / 300).sin() * weights[0] + conditioning["encoder_hidden_states"].mean((1, 2))
        per_sample = per_sample + conditioning["added_cond_kwargs"]["time_ids"].mean(1) * weights[1]
        if w is not None:
            per_sample = per_sample + 0.1 * w * weights[2]
        if "end" in conditioning:
            per_sample = per_sample + conditioning["end"] * weights[0]
        return (x * weights[3] + per_sample.view(-1, 1, 1, 1)).tanh() * weights[4]

    return call


def _conditioning(generator):
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {"encoder_hidden_states": draw(5, 7, 3), "added_cond_kwargs": {"time_ids": draw(5, 6)}}


def _row(conditioning, i):
    return {
        "encoder_hidden_states": conditioning["encoder_hidden_states"][i : i + 1],
        "added_cond_kwargs": {"time_ids": conditioning["added_cond_kwargs"]["time_ids"][i : i + 1]},
    }


def _abar(t: float) -> float:
    low = min(int(t), 998)
    log_sigma = [0.5 * math.log((1 - ABAR[i]) / ABAR[i]) for i in (low, low + 1)]
    return 1 / (1 + math.exp(2 * (log_sigma[0] + (t - low) * (log_sigma[1] - log_sigma[0]))))


def _seen(output, x, abar, kind):
    """(x0, eps) from the three kinds of output."""
    signal, noise = math.sqrt(abar), math.sqrt(1 - abar)
    if kind == "epsilon":
        return (x - noise * output) / signal, output
    if kind == "v_prediction":
        return signal * x - noise * output, signal * output + noise * x
    return output, (x - signal * output) / noise


def _consistency(network, x, t, conditioning, w, kind):
    """arXiv 2310.04378 Eq. 9 with sigma_data 0.5 and timestep scaling 10."""
    x0, _ = _seen(network(x, torch.tensor([t]), conditioning, w), x, _abar(t), kind)
    scaled = 10.0 * t
    return 0.25 / (scaled**2 + 0.25) * x + scaled / math.sqrt(scaled**2 + 0.25) * x0


def _trajectory(network, x, t, end, conditioning, w, kind):
    """The step of arXiv 2402.19159 from t to `end`, in its exponential form with lambda = log(alpha / sigma)."""
    x0, _ = _seen(network(x, torch.tensor([t]), conditioning, w), x, _abar(t), kind)
    lam = [0.5 * math.log(_abar(v) / (1 - _abar(v))) for v in (t, end)]
    sigma = [math.sqrt(1 - _abar(v)) for v in (t, end)]
    return sigma[1] / sigma[0] * x - math.sqrt(_abar(end)) * math.expm1(lam[0] - lam[1]) * x0


def _teacher_eps(teacher, x, t, conditioning, null, w, kind, abar=None):
    """Asked at t about an x at signal level `abar`, which is t's own where t is not rounded."""
    abar = _abar(t) if abar is None else abar
    eps = [_seen(teacher(x, torch.tensor([t]), c, None), x, abar, kind)[1] for c in (conditioning, null)]
    return (1 + w) * eps[0] - w * eps[1]


def _jump(teacher, x, t, s, conditioning, null, w, solver, kind):
    """DDIM (arXiv 2010.02502 Eq. 12), or DPM-Solver++(2S) with r = 1/2 (arXiv 2211.01095 Alg. 1)."""
    eps = _teacher_eps(teacher, x, t, conditioning, null, w, kind)
    x0 = (x - math.sqrt(1 - _abar(t)) * eps) / math.sqrt(_abar(t))
    if solver == "ddim":
        return math.sqrt(_abar(s)) * x0 + math.sqrt(1 - _abar(s)) * eps
    lam = [0.5 * math.log(_abar(v) / (1 - _abar(v))) for v in (t, s)]
    half, h = (lam[0] + lam[1]) / 2, lam[1] - lam[0]
    abar_mid = 1 / (1 + math.exp(-2 * half))
    sigma = [math.sqrt(1 - _abar(v)) for v in (t, s)]
    u = math.sqrt(1 - abar_mid) / sigma[0] * x - math.sqrt(abar_mid) * math.expm1(-h / 2) * x0
    low, high = s, t
    for _ in range(200):  # the timestep whose lambda is the midpoint's
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * math.log(_abar(middle) / (1 - _abar(middle))) > half else (low, middle)
    middle = round(middle * 512) / 512  # as samplers do: `VariancePreserving.sigma_to_t` says why
    eps_mid = _teacher_eps(teacher, u, middle, conditioning, null, w, kind, abar_mid)
    x0_mid = (u - math.sqrt(1 - abar_mid) * eps_mid) / math.sqrt(abar_mid)
    return sigma[1] / sigma[0] * x - math.sqrt(_abar(s)) * math.expm1(-h) * x0_mid


def _distance(difference, config):
    if config.loss == "l2":
        return float((difference**2).mean())
    if config.loss == "huber":
        return float(((difference**2 + config.huber_c**2).sqrt() - config.huber_c).mean())
    return float((1 + difference**2 / (2 * config.huber_c**2)).log().mean())


def _reference(networks, sample, config, kind):
    """The loss of each sample; what was drawn is taken from `sample`, everything else is computed here."""
    online, target, teacher, *_ = networks
    losses = []
    for i in range(len(sample.x0)):
        x0, eps, w = sample.x0[i : i + 1], sample.eps[i : i + 1].double(), sample.w[i : i + 1].double()
        t, s, end = (int(getattr(sample.points, name)[i]) for name in ("t", "s", "end"))
        cond, null = _row(sample.conditioning, i), _row(sample.null_conditioning, i)
        told = {**cond, "end": torch.tensor([end / 1000])} if config.kind == "flowmap" else cond
        x_t = math.sqrt(_abar(t)) * x0 + math.sqrt(1 - _abar(t)) * eps
        if config.kind == "finetune":
            x_s = math.sqrt(_abar(s)) * x0 + math.sqrt(1 - _abar(s)) * eps
        else:
            x_s = _jump(teacher, x_t, t, s, cond, null, float(w), config.solver, kind)
        if config.kind in ("lcd", "finetune"):
            difference = _consistency(online, x_t, t, cond, w, kind) - _consistency(target, x_s, s, cond, w, kind)
        else:
            landed = _trajectory(online, x_t, t, end, told, w, kind)
            difference = landed - _trajectory(target, x_s, s, end, told, w, kind)
        losses.append(_distance(difference, config))
    return torch.tensor(losses, dtype=torch.float64)


def _sample(config, seed=0, step=0, kind="epsilon"):
    draw = torch.Generator().manual_seed(seed)
    x0 = torch.randn(SHAPE, generator=draw, dtype=torch.float64)
    batch = Batch(x0, _conditioning(draw), _conditioning(draw))
    sample = make_sample(batch, config, _diffusion(config, kind), draw, step=step)
    return each(sample, lambda value: value.double() if value.is_floating_point() else value)


def _loss(config, sample, kind="epsilon", networks=None):
    return get_method(config).loss(networks or NETWORKS, sample, _diffusion(config, kind), config)


NETWORKS = Networks(_network(1), _network(2), _network(3), _network(4))


@pytest.mark.parametrize("loss", ["l2", "huber", "cauchy"])
@pytest.mark.parametrize("solver_name", ["ddim", "dpmpp_2s"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("method", ["lcd", "finetune", "tcd", "segmented", "flowmap"])
def test_the_loss_equals_the_papers(method, kind, solver_name, loss):
    config = _config(method, loss=loss, **({} if method == "finetune" else {"solver": solver_name}))
    for seed in range(3):
        sample = _sample(config, seed)
        ours = _loss(config, sample, kind)
        torch.testing.assert_close(ours, _reference(NETWORKS, sample, config, kind), rtol=1e-6, atol=1e-9)


def _flow_loss(networks, sample, config):
    """The losses of a rectified flow by hand: f = x - s v, the teacher's jump Euler's step with the guided velocity."""
    losses, points = [], sample.points
    for i in range(len(sample.x0)):
        x0, eps, w = sample.x0[i : i + 1], sample.eps[i : i + 1], sample.w[i : i + 1]
        t, s, end = (points.t[i : i + 1] / 1000, points.s[i : i + 1] / 1000, points.end[i : i + 1] / 1000)
        cond, null = _row(sample.conditioning, i), _row(sample.null_conditioning, i)
        x_t = (1 - t) * x0 + t * eps
        velocity = (1 + w) * networks.teacher(x_t, 1000 * t, cond, None) - w * networks.teacher(
            x_t, 1000 * t, null, None
        )
        x_s = (1 - s) * x0 + s * eps if config.kind == "finetune" else x_t + (s - t) * velocity
        goal = end if config.kind in ("tcd", "segmented", "flowmap") else torch.zeros_like(end)
        told = {**cond, "end": end} if config.kind == "flowmap" else cond
        guess = x_t + (goal - t) * networks.online(x_t, 1000 * t, told, w)
        aim = x_s + (goal - s) * networks.target(x_s, 1000 * s, told, w)
        losses.append(_distance(guess - aim, config))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("loss", ["l2", "huber", "cauchy"])
@pytest.mark.parametrize("method", ["lcd", "finetune", "tcd", "segmented", "flowmap"])
def test_the_loss_on_a_flow_equals_one_written_by_hand(method, loss):
    config = _config(method, loss=loss)
    for seed in range(3):
        sample = _sample(config, seed, kind="flow")
        ours = _loss(config, sample, "flow")
        torch.testing.assert_close(ours, _flow_loss(NETWORKS, sample, config), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("step", [0, 1])
def test_distribution_matching_on_a_flow_equals_one_written_by_hand(step):
    config = _config("dmd2", phases=4)
    for seed in range(8):
        sample = _sample(config, seed, step, "flow")
        points, cond, null, w = sample.points, sample.conditioning, sample.null_conditioning, sample.w
        column = lambda t: (t / 1000).view(-1, 1, 1, 1)  # noqa: E731
        x, visited = sample.eps, points.path.unbind(1)  # t = 1000 is pure noise
        assert (visited[0] == 1000).all()
        for number, t in enumerate(visited):
            picture = x - column(t) * NETWORKS.online(x, t, cond, w)
            if number < len(visited) - 1:
                after = column(visited[number + 1])
                x = (1 - after) * picture + after * points.path_noise[:, number]
        end, s = column(points.critic_t), column(points.score_t)
        noisy = (1 - end) * picture + end * points.critic_noise
        velocity = NETWORKS.critic(noisy, points.critic_t, cond, w)
        expected = (velocity - (points.critic_noise - picture)).square().flatten(1).mean(1)
        if step == 0:
            x_s = (1 - s) * picture + s * points.score_noise
            scale = column(1000 * w)
            teacher = [NETWORKS.teacher(x_s, points.score_t, c, None) for c in (cond, null)]
            real = x_s - s * ((1 + scale) * teacher[0] - scale * teacher[1])
            fake = x_s - s * NETWORKS.critic(x_s, points.score_t, cond, w)
            g = (fake - real) / (picture - real).abs().mean((1, 2, 3), keepdim=True)
            expected = expected + g.square().flatten(1).mean(1) / 2
        torch.testing.assert_close(_loss(config, sample, "flow"), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["lcd", "tcd", "segmented"])
def test_a_flow_draws_its_whole_shifted_line(method):
    """t on the shifted grid, s its neighbour, and the ends of phases where a sampler of as many steps looks."""
    config = _config(method)
    points = get_method(config).draw(20_000, config, _diffusion(config, "flow"), torch.Generator().manual_seed(0))
    grid = [1000 * 3 * u / (1 + 2 * u) for u in (n / 50 for n in range(51))]
    assert sorted(set(points.t.tolist())) == pytest.approx(grid[1:])
    assert (points.end <= points.s).all()
    assert (points.s < points.t).all()
    if method == "segmented":
        edges = [0.0, *reversed(get_timesteps_lcm(4, process=FLOW.process).tolist()[1:])]
        assert sorted(set(points.end.tolist())) == pytest.approx(edges)
    if method == "lcd":
        torch.testing.assert_close(points.end, torch.zeros_like(points.end))


@pytest.mark.parametrize("method", ["lcd", "tcd", "segmented", "dmd2", "tdm", "finetune"])
def test_video_latents_do_not_go_through(method):
    """(B, C, T, h, w): every method is of elements, whatever their shape."""
    config = _config(method, noise_offset=0.1)
    network = lambda x, t, c, w: x * 0.5  # noqa: E731
    batch = Batch(torch.randn(3, 4, 2, 3, 3), {}, {})
    sample = make_sample(batch, config, _diffusion(config, "flow"), torch.Generator().manual_seed(0))
    losses = _loss(config, sample, "flow", Networks(network, network, network, network))
    assert losses.shape == (3,)
    assert losses.isfinite().all()


@pytest.mark.parametrize("steps", [2, 10, 50, 200])
def test_the_improved_fine_tuning_equals_the_papers(steps):
    """arXiv 2502.01441: Cauchy distance with c = exp(-1.18 log(N - 1) - 0.72), and denoising on the least noisy t."""
    config = _config("finetune", loss="cauchy", huber_c=0.0, original_steps=steps, diffusion_weight=0.3)
    c = math.exp(-1.18 * math.log(steps - 1) - 0.72)
    for seed in range(3):
        sample = _sample(config, seed)
        expected = _reference(NETWORKS, sample, replace(config, huber_c=c), "epsilon")
        for i, t in enumerate(sample.points.t.tolist()):
            if t < 250:
                x0, w = sample.x0[i : i + 1], sample.w[i : i + 1]
                x_t = math.sqrt(_abar(t)) * x0 + math.sqrt(1 - _abar(t)) * sample.eps[i : i + 1]
                guess = _consistency(NETWORKS.online, x_t, t, _row(sample.conditioning, i), w, "epsilon")
                expected[i] += 0.3 * float((1 + (guess - x0) ** 2 / (2 * c**2)).log().mean())
        ours = _loss(config, sample)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
