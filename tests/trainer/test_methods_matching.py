"""Paired noise and distribution matching against second implementations in float64."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from lcm_core.diffusion.grids import get_timesteps_lcm
from tests.trainer.test_methods import (
    NETWORKS,
    SHAPE,
    _abar,
    _config,
    _consistency,
    _diffusion,
    _loss,
    _row,
    _sample,
    _seen,
    _teacher_eps,
)
from trainer.data.cache import Batch
from trainer.methods.dmd2 import matching_loss
from trainer.methods.method import make_sample
from trainer.methods.shared import Networks, pair_noise


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
