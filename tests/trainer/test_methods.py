"""Every method's loss against a second implementation in float64, one sample at a time, from the papers' equations."""

import itertools
import math
import operator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from lcm_core.diffusion import solver
from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.diffusion.grids import get_timesteps_lcm
from lcm_core.diffusion.process import RectifiedFlow, VariancePreserving
from lcm_core.diffusion.schedule import get_alphas_cumprod
from lcm_core.diffusion.solver import solver_jump
from lcm_core.errors import InputError
from trainer.data.cache import Batch
from trainer.distill import for_method
from trainer.methods.config import (
    METHOD_CONFIGS,
    SOLVERS,
    MethodConfig,
    defaults_of,
    method_config,
    methods_that_read,
)
from trainer.methods.dmd2 import matching_loss
from trainer.methods.method import get_method, make_sample
from trainer.methods.segmented import phase_edges
from trainer.methods.shared import Networks, draw_noise, draw_pair, each, guided_teacher, pair_noise, snr_weight

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
    online, target, teacher, _ = networks
    losses = []
    for i in range(len(sample.x0)):
        x0, eps, w = sample.x0[i : i + 1], sample.eps[i : i + 1].double(), sample.w[i : i + 1].double()
        t, s, end = (int(getattr(sample.points, name)[i]) for name in ("t", "s", "end"))
        cond, null = _row(sample.conditioning, i), _row(sample.null_conditioning, i)
        x_t = math.sqrt(_abar(t)) * x0 + math.sqrt(1 - _abar(t)) * eps
        if config.kind == "finetune":
            x_s = math.sqrt(_abar(s)) * x0 + math.sqrt(1 - _abar(s)) * eps
        else:
            x_s = _jump(teacher, x_t, t, s, cond, null, float(w), config.solver, kind)
        if config.kind in ("lcd", "finetune"):
            difference = _consistency(online, x_t, t, cond, w, kind) - _consistency(target, x_s, s, cond, w, kind)
        else:
            landed = _trajectory(online, x_t, t, end, cond, w, kind)
            difference = landed - _trajectory(target, x_s, s, end, cond, w, kind)
        losses.append(_distance(difference, config))
    return torch.tensor(losses, dtype=torch.float64)


def _dmd2(networks, sample, kind):
    """DMD2 from its papers: simulation, critic's denoising loss, and |x - (x - g)|^2 / 2 with g as published."""
    losses, points = [], sample.points
    for i in range(len(sample.x0)):
        cond, null, w = _row(sample.conditioning, i), _row(sample.null_conditioning, i), sample.w[i : i + 1].double()
        noisy = lambda x, noise, t: math.sqrt(_abar(t)) * x + math.sqrt(1 - _abar(t)) * noise  # noqa: E731
        visited = [int(t) for t in points.path[i]]
        x = math.sqrt(1 - _abar(visited[0])) * sample.eps[i : i + 1]
        for before, t, noise in zip(visited, visited[1:], points.path_noise[i], strict=False):
            x = noisy(_consistency(networks.online, x, before, cond, w, kind), noise[None], t)
        x = _consistency(networks.online, x, visited[-1], cond, w, kind)
        end, s = int(points.critic_t[i]), int(points.score_t[i])
        critic_noise, score_noise = points.critic_noise[i : i + 1], points.score_noise[i : i + 1]
        output = networks.critic(noisy(x, critic_noise, end), torch.tensor([end]), cond, w)
        signal, spread = math.sqrt(_abar(end)), math.sqrt(1 - _abar(end))
        aims = {"epsilon": critic_noise, "v_prediction": signal * critic_noise - spread * x, "sample": x}
        loss = float(((output - aims[kind]) ** 2).mean())
        if sample.student_turn:
            x_s = noisy(x, score_noise, s)
            eps = _teacher_eps(networks.teacher, x_s, s, cond, null, float(w), kind)
            real = (x_s - math.sqrt(1 - _abar(s)) * eps) / math.sqrt(_abar(s))
            fake, _ = _seen(networks.critic(x_s, torch.tensor([s]), cond, w), x_s, _abar(s), kind)
            g = ((x - real) - (x - fake)) / (x - real).abs().mean()
            loss += 0.5 * float((g**2).mean())
        losses.append(loss)
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
@pytest.mark.parametrize("method", ["lcd", "finetune", "tcd", "segmented"])
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
        goal = end if config.kind in ("tcd", "segmented") else torch.zeros_like(end)
        guess = x_t + (goal - t) * networks.online(x_t, 1000 * t, cond, w)
        aim = x_s + (goal - s) * networks.target(x_s, 1000 * s, cond, w)
        losses.append(_distance(guess - aim, config))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("loss", ["l2", "huber", "cauchy"])
@pytest.mark.parametrize("method", ["lcd", "finetune", "tcd", "segmented"])
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


def test_paired_noise_is_the_cheapest_of_all_pairings():
    """Against every permutation; the noises themselves stay the same ones."""
    draw = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(6, 4, 2, 2, generator=draw) for _ in range(2))
    paired = pair_noise(x0, eps)
    costs = (x0.flatten(1)[:, None] - eps.flatten(1)[None]).square().sum(-1)
    cheapest = min(sum(float(costs[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(6)))
    assert float((x0 - paired).square().sum()) == pytest.approx(cheapest, rel=1e-5)
    assert sorted(paired.flatten(1)[:, 0].tolist()) == sorted(eps.flatten(1)[:, 0].tolist())
    config = _config(pair_noise=True)
    sample = make_sample(Batch(x0, {}, {}), config, _diffusion(config), torch.Generator().manual_seed(1))
    torch.testing.assert_close(sample.eps, pair_noise(x0, sample.eps), rtol=0, atol=0)


@pytest.mark.parametrize("phases", [1, 2, 4])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("step", [0, 1])
def test_distribution_matching_equals_the_papers(kind, phases, step):
    config = _config("dmd2", phases=phases)
    for seed in range(8):  # several numbers of steps, and places among them
        sample = _sample(config, seed, step)
        assert sample.student_turn == (step == 0)
        torch.testing.assert_close(_loss(config, sample, kind), _dmd2(NETWORKS, sample, kind), rtol=1e-6, atol=1e-9)


def test_distribution_matching_moves_the_pictures_against_g():
    """The gradient of the student's loss in its picture must be g / elements: the aim, the teacher and the critic are
    constants."""
    config = _config("dmd2", phases=1)
    sample = _sample(config)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    asked = NETWORKS.given(sample)
    d, s = _diffusion(config), sample.points.score_t
    losses = matching_loss(asked.teacher, asked.critic, x, d.noise(x.detach(), sample.points.score_noise, s), s, d)
    losses.sum().backward()
    torch.testing.assert_close((x.grad * x[0].numel()).square().flatten(1).mean(1) / 2, losses.detach())


def _tdm(networks, sample, kind, scales):
    """TDM from its paper: plain jumps of the student, noise back up into the part that was jumped over, and there the
    critic's guess of the student's clean picture, and teacher against critic. `scales(t)` is (a, b)."""

    def seen(output, x, t):
        a, b = scales(t)
        x0 = {
            "epsilon": (x - b * output) / a if a else None,
            "v_prediction": a * x - b * output,
            "flow": x - b * output,
        }
        noise = {"epsilon": output, "v_prediction": b * x + a * output, "flow": x + a * output}
        return x0[kind], noise[kind]

    losses, points = [], sample.points
    for i in range(len(sample.x0)):
        cond, null, w = _row(sample.conditioning, i), _row(sample.null_conditioning, i), sample.w[i : i + 1]
        asked = lambda network, x, t, c=cond: network(x, torch.tensor([t]), c, w)  # noqa: E731, B023
        visited = points.path[i].tolist()
        x = scales(visited[0])[1] * sample.eps[i : i + 1]
        for number, t in enumerate(visited):
            x0, noise = seen(asked(networks.online, x, t), x, t)
            after = visited[number + 1] if number < len(visited) - 1 else points.end[i].item()
            x = scales(after)[0] * x0 + scales(after)[1] * noise
        end, tau = points.end[i].item(), points.score_t[i].item()
        assert end < tau <= visited[-1]
        (a_s, b_s), (a, b) = scales(end), scales(tau)
        x_tau = a / a_s * x + math.sqrt(max(b**2 - (a / a_s * b_s) ** 2, 0)) * points.score_noise[i : i + 1]
        mixed = (x_tau - a * x0) / b
        aim = {"epsilon": mixed, "v_prediction": a * mixed - b * x0, "flow": mixed - x0}[kind]
        output = asked(networks.critic, x_tau, tau)
        loss = float(((output - aim) ** 2).mean())
        if sample.student_turn:
            halves = [networks.teacher(x_tau, torch.tensor([tau]), c, None) for c in (cond, null)]
            real = seen((1 + w) * halves[0] - w * halves[1], x_tau, tau)[0]
            g = (seen(output, x_tau, tau)[0] - real) / (x0 - real).abs().mean()
            loss += 0.5 * float((g**2).mean())
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_trajectory_distribution_matching_equals_the_paper(kind, step):
    config = _config("tdm", phases=4, critic_updates=2)
    scales = (
        (lambda t: (1 - t / 1000, t / 1000)) if kind == "flow" else lambda t: (_abar(t) ** 0.5, (1 - _abar(t)) ** 0.5)
    )
    for seed in range(8):
        sample = _sample(config, seed, step, kind)
        expected = _tdm(NETWORKS, sample, kind, scales)
        torch.testing.assert_close(_loss(config, sample, kind), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["dmd2", "tdm"])
def test_the_diversity_guard_is_the_stated_share_of_lcd(method):
    """In the student's turn alone, and with the consistency loss as `lcd` itself computes it."""
    plain, guarded = (_config(method, critic_updates=5, consistency_share=share) for share in (0.0, 0.25))
    for step in (0, 1):
        sample = _sample(plain, 3, step)
        critic = _loss(plain, replace(sample, student_turn=False))
        expected = critic + 0.75 * (_loss(plain, sample) - critic)
        if step == 0:
            lcd = _config("lcd", huber_c=0.001)
            expected = expected + 0.25 * _loss(lcd, replace(sample, points=sample.points.pair))
        torch.testing.assert_close(_loss(guarded, sample), expected, rtol=1e-9, atol=1e-12)


def test_distribution_matching_prepares_for_fewer_steps_too():
    config = _config("dmd2", phases=4)
    paths = set()
    for seed in range(200):
        path = _sample(config, seed).points.path
        assert (path == path[:1]).all()
        paths.add(tuple(path[0].tolist()))
    four, two = get_timesteps_lcm(4).tolist(), get_timesteps_lcm(2).tolist()
    assert paths == {tuple(grid[: n + 1]) for grid in (four, two) for n in range(len(grid))}


@pytest.mark.parametrize(("step", "learns"), [(0, {0, 3}), (1, {3}), (4, {3}), (5, {0, 3})])
def test_the_critic_learns_in_every_step_and_the_student_in_its_turn(step, learns):
    weights = [torch.nn.Parameter(torch.tensor(0.5)) for _ in range(4)]
    networks = Networks(*(lambda x, t, c, w, p=p: x * p for p in weights))
    config = _config("dmd2", critic_updates=5)
    _loss(config, _sample(config, step=step), networks=networks).sum().backward()
    assert {i for i, weight in enumerate(weights) if weight.grad is not None} == learns


@pytest.mark.parametrize("method", ["lcd", "finetune", "tcd", "segmented"])
def test_only_the_online_network_learns(method):
    weights = [torch.nn.Parameter(torch.tensor(0.5)) for _ in range(3)]
    networks = Networks(*(lambda x, t, c, w, p=p: x * p for p in (*weights, None)))
    config = _config(method)
    _loss(config, _sample(config), networks=networks).sum().backward()
    assert weights[0].grad is not None
    assert weights[1].grad is None
    assert weights[2].grad is None


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
