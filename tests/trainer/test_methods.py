"""Every method's loss against a second implementation in float64, one sample at a time, from the papers' equations."""

import itertools
import math
import operator
from dataclasses import replace

import pytest
import torch

from lcm_core.diffusion.schedule import NoiseSchedule, get_alphas_cumprod, get_timesteps_lcm
from lcm_core.errors import InputError
from trainer.data.cache import Batch
from trainer.methods.config import MethodConfig
from trainer.methods.dmd2 import matching_loss
from trainer.methods.method import get_method, make_sample
from trainer.methods.segmented import phase_edges
from trainer.methods.shared import Networks, at, draw_noise, draw_timesteps, pair, snr_weight, teacher_jump

SHAPE = (5, 4, 3, 2)
BETAS = [(math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2 for i in range(1000)]
ABAR = list(itertools.accumulate((1 - beta for beta in BETAS), operator.mul))
CONFIG = MethodConfig(huber_c=0.01, w_min=1, w_max=9)


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


def _teacher_eps(teacher, x, t, conditioning, null, w, kind):
    eps = [_seen(teacher(x, torch.tensor([t]), c, None), x, _abar(t), kind)[1] for c in (conditioning, null)]
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
    middle = round(middle * 512) / 512  # as samplers do: `timesteps_from_sigmas` says why
    eps_mid = _teacher_eps(teacher, u, middle, conditioning, null, w, kind)
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
        t, s, end = int(sample.t[i]), int(sample.s[i]), int(sample.end[i])
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


def _dmd2(networks, sample, config, kind):
    """DMD2 from its papers: simulation, critic's denoising loss, and |x - (x - g)|^2 / 2 with g as published."""
    losses = []
    for i in range(len(sample.x0)):
        cond, null, w = _row(sample.conditioning, i), _row(sample.null_conditioning, i), sample.w[i : i + 1].double()
        noises = [noise[None].double() for noise in sample.noises[i]]
        noisy = lambda x, noise, t: math.sqrt(_abar(t)) * x + math.sqrt(1 - _abar(t)) * noise  # noqa: E731
        visited = [*sample.path, int(sample.t[i])]
        x = math.sqrt(1 - _abar(visited[0])) * sample.eps[i : i + 1]
        for before, t, noise in zip(visited, visited[1:], noises, strict=False):
            x = noisy(_consistency(networks.online, x, before, cond, w, kind), noise, t)
        x = _consistency(networks.online, x, visited[-1], cond, w, kind)
        end, s = int(sample.end[i]), int(sample.s[i])
        output = networks.critic(noisy(x, noises[-1], end), torch.tensor([end]), cond, w)
        signal, spread = math.sqrt(_abar(end)), math.sqrt(1 - _abar(end))
        aims = {"epsilon": noises[-1], "v_prediction": signal * noises[-1] - spread * x, "sample": x}
        loss = float(((output - aims[kind]) ** 2).mean())
        if sample.student_turn:
            x_s = noisy(x, noises[-2], s)
            eps = _teacher_eps(networks.teacher, x_s, s, cond, null, float(w), kind)
            real = (x_s - math.sqrt(1 - _abar(s)) * eps) / math.sqrt(_abar(s))
            fake, _ = _seen(networks.critic(x_s, torch.tensor([s]), cond, w), x_s, _abar(s), kind)
            g = ((x - real) - (x - fake)) / (x - real).abs().mean()
            loss += 0.5 * float((g**2).mean())
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64)


def _sample(config, seed=0, step=0):
    draw = torch.Generator().manual_seed(seed)
    x0 = torch.randn(SHAPE, generator=draw, dtype=torch.float64)
    batch = Batch(x0, _conditioning(draw), _conditioning(draw))
    sample = make_sample(batch, config, get_alphas_cumprod(), draw, step=step)
    return replace(sample, eps=sample.eps.double(), w=sample.w.double(), noises=sample.noises.double())


NETWORKS = Networks(_network(1), _network(2), _network(3), _network(4))


@pytest.mark.parametrize("loss", ["l2", "huber", "cauchy"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2s"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("method", ["lcd", "finetune", "tcd", "segmented"])
def test_the_loss_equals_the_papers(method, kind, solver, loss):
    config = replace(CONFIG, kind=method, loss=loss, solver=solver)
    for seed in range(3):
        sample = _sample(config, seed)
        ours = get_method(config).loss(NETWORKS, sample, get_alphas_cumprod(), config, kind)
        torch.testing.assert_close(ours, _reference(NETWORKS, sample, config, kind), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 10, 50, 200])
def test_the_improved_fine_tuning_equals_the_papers(steps):
    """arXiv 2502.01441: Cauchy distance with c = exp(-1.18 log(N - 1) - 0.72), and denoising on the least noisy t."""
    config = MethodConfig(kind="finetune", loss="cauchy", huber_c=0.0, original_steps=steps, diffusion_weight=0.3)
    c = math.exp(-1.18 * math.log(steps - 1) - 0.72)
    for seed in range(3):
        sample = _sample(config, seed)
        expected = _reference(NETWORKS, sample, replace(config, huber_c=c), "epsilon")
        for i, t in enumerate(sample.t.tolist()):
            if t < 250:
                x0, w = sample.x0[i : i + 1], sample.w[i : i + 1]
                x_t = math.sqrt(_abar(t)) * x0 + math.sqrt(1 - _abar(t)) * sample.eps[i : i + 1]
                guess = _consistency(NETWORKS.online, x_t, t, _row(sample.conditioning, i), w, "epsilon")
                expected[i] += 0.3 * float((1 + (guess - x0) ** 2 / (2 * c**2)).log().mean())
        ours = get_method(config).loss(NETWORKS, sample, get_alphas_cumprod(), config, "epsilon")
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_paired_noise_is_the_cheapest_of_all_pairings():
    """Against every permutation; the noises themselves stay the same ones."""
    draw = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(6, 4, 2, 2, generator=draw) for _ in range(2))
    paired = pair(x0, eps)
    costs = (x0.flatten(1)[:, None] - eps.flatten(1)[None]).square().sum(-1)
    cheapest = min(sum(float(costs[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(6)))
    assert float((x0 - paired).square().sum()) == pytest.approx(cheapest, rel=1e-5)
    assert sorted(paired.flatten(1)[:, 0].tolist()) == sorted(eps.flatten(1)[:, 0].tolist())
    config = replace(CONFIG, pair_noise=True)
    sample = make_sample(Batch(x0, {}, {}), config, get_alphas_cumprod(), torch.Generator().manual_seed(1))
    torch.testing.assert_close(sample.eps, pair(x0, sample.eps), rtol=0, atol=0)


@pytest.mark.parametrize("phases", [1, 2, 4])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("step", [0, 1])
def test_distribution_matching_equals_the_papers(kind, phases, step):
    config = replace(CONFIG, kind="dmd2", phases=phases)
    for seed in range(8):  # several numbers of steps, and places among them
        sample = _sample(config, seed, step)
        assert sample.student_turn == (step == 0)
        ours = get_method(config).loss(NETWORKS, sample, get_alphas_cumprod(), config, kind)
        torch.testing.assert_close(ours, _dmd2(NETWORKS, sample, config, kind), rtol=1e-6, atol=1e-9)


def test_distribution_matching_moves_the_pictures_against_g():
    """The gradient of the student's loss in its picture must be g / elements: the aim, the teacher and the critic are
    constants."""
    config = replace(CONFIG, kind="dmd2", phases=1)
    sample, abar = _sample(config), get_alphas_cumprod()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    losses = matching_loss(NETWORKS, x, sample, abar, "epsilon")
    losses.sum().backward()
    torch.testing.assert_close((x.grad * x[0].numel()).square().flatten(1).mean(1) / 2, losses.detach())


def test_distribution_matching_prepares_for_fewer_steps_too():
    config = replace(CONFIG, kind="dmd2", phases=4)
    paths = set()
    for seed in range(200):
        sample = _sample(config, seed)
        assert len(set(sample.t.tolist())) == 1
        paths.add((*sample.path, int(sample.t[0])))
    four, two = get_timesteps_lcm(4).tolist(), get_timesteps_lcm(2).tolist()
    assert paths == {tuple(grid[: n + 1]) for grid in (four, two) for n in range(len(grid))}


@pytest.mark.parametrize(("step", "learns"), [(0, {0, 3}), (1, {3}), (4, {3}), (5, {0, 3})])
def test_the_critic_learns_in_every_step_and_the_student_in_its_turn(step, learns):
    weights = [torch.nn.Parameter(torch.tensor(0.5)) for _ in range(4)]
    networks = Networks(*(lambda x, t, c, w, p=p: x * p for p in weights))
    config = replace(CONFIG, kind="dmd2", critic_updates=5)
    sample = _sample(config, step=step)
    get_method(config).loss(networks, sample, get_alphas_cumprod(), config, "epsilon").sum().backward()
    assert {i for i, weight in enumerate(weights) if weight.grad is not None} == learns


@pytest.mark.parametrize("method", ["lcd", "finetune", "tcd", "segmented"])
def test_only_the_online_network_learns(method):
    weights = [torch.nn.Parameter(torch.tensor(0.5)) for _ in range(3)]
    networks = Networks(*(lambda x, t, c, w, p=p: x * p for p in (*weights, None)))
    config = replace(CONFIG, kind=method)
    get_method(config).loss(networks, _sample(config), get_alphas_cumprod(), config, "epsilon").sum().backward()
    assert weights[0].grad is not None
    assert weights[1].grad is None
    assert weights[2].grad is None


def test_timesteps_lie_on_the_grid_one_skip_apart():
    t, s = draw_timesteps(4096, MethodConfig(), get_alphas_cumprod(), torch.Generator().manual_seed(0))
    assert sorted(set(t.tolist())) == list(range(19, 1000, 20))
    torch.testing.assert_close(s, torch.where(t == 19, 0, t - 20))


def test_jitter_reaches_every_timestep():
    config = MethodConfig(grid_jitter=True)
    t, s = draw_timesteps(40000, config, get_alphas_cumprod(), torch.Generator().manual_seed(0))
    assert sorted(set(t.tolist())) == list(range(1000))
    torch.testing.assert_close(s, (t - 20).clamp(min=0))


def test_lognormal_timesteps_follow_the_normal_distribution_of_log_sigma():
    config = MethodConfig(timestep_sampling="lognormal")
    t, _ = draw_timesteps(200_000, config, get_alphas_cumprod(), torch.Generator().manual_seed(0))
    edges = [0.5 * math.log((1 - ABAR[v]) / ABAR[v]) for v in [0, *range(19, 1000, 20)]]
    normal = torch.distributions.Normal(-1.1, 2.0)
    shares = normal.cdf(torch.tensor(edges)).diff()
    shares = shares / shares.sum()
    found = torch.bincount(t // 20, minlength=50) / len(t)
    torch.testing.assert_close(found, shares, rtol=0, atol=0.005)


def test_tcd_ends_anywhere_between_zero_and_the_jump():
    points = get_method(MethodConfig(kind="tcd")).draw(
        200_000, MethodConfig(), get_alphas_cumprod(), torch.Generator().manual_seed(0)
    )
    assert (points.end <= points.s).all()
    ends = points.end[points.s == 19]
    torch.testing.assert_close(torch.bincount(ends) / len(ends), torch.full((20,), 1 / 20), rtol=0, atol=0.02)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_tcd_ends_at_the_clean_picture(share):
    """1 is the plain consistency loss's choice; what does not end there ends anywhere, as without the option."""
    config = MethodConfig(kind="tcd", clean_share=share)
    points = get_method(config).draw(200_000, config, get_alphas_cumprod(), torch.Generator().manual_seed(0))
    ends = points.end[points.s == 979]
    expected = torch.full((980,), (1 - share) / 980)
    expected[0] += share
    torch.testing.assert_close(torch.bincount(ends, minlength=980) / len(ends), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("phases", [1, 2, 3, 4, 8, 50])
def test_phases_end_where_a_sampler_of_as_many_steps_looks(phases):
    edges = phase_edges(MethodConfig(phases=phases), 1000)
    visited = get_timesteps_lcm(phases).flip(0)[:-1]
    torch.testing.assert_close(edges, torch.cat([torch.zeros(1, dtype=torch.int64), visited]))


def test_no_segmented_jump_leaves_its_phase():
    config = MethodConfig(kind="segmented", phases=4, grid_jitter=True)
    x0 = torch.zeros(4000, 1, 1, 1)
    sample = make_sample(Batch(x0, {}, {}), config, get_alphas_cumprod(), torch.Generator().manual_seed(0))
    edges = torch.tensor([-1, 259, 499, 759, 999])
    phase = torch.bucketize(sample.t, edges)
    torch.testing.assert_close(sample.end, edges[phase - 1].clamp(min=0))
    assert (sample.s >= sample.end).all()


@pytest.mark.parametrize("method", ["tcd", "dmd2"])
def test_each_process_draws_its_rows_of_what_one_would_draw(method):
    config = replace(CONFIG, kind=method, noise_offset=0.1)
    x0 = torch.arange(8.0).view(8, 1, 1, 1)
    alphas = get_alphas_cumprod()
    whole = make_sample(Batch(x0, {}, {}), config, alphas, torch.Generator().manual_seed(3))
    part = make_sample(Batch(x0[5:7], {}, {}), config, alphas, torch.Generator().manual_seed(3), 8, 5)
    for name in ("x0", "eps", "t", "s", "end", "w", "noises"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[5:7], rtol=0, atol=0)


def test_snr_weights():
    """min(SNR, gamma) and max(SNR, 1); a weight multiplies its own sample's loss."""
    abar = torch.tensor([0.9, 0.5, 0.1])
    snr = torch.tensor([9.0, 1.0, 1 / 9])
    torch.testing.assert_close(snr_weight(abar, MethodConfig(weighting="min_snr")), snr.clamp(max=5))
    torch.testing.assert_close(snr_weight(abar, MethodConfig(weighting="truncated_snr")), snr.clamp(min=1))
    config = replace(CONFIG, weighting="min_snr")
    sample = _sample(config)
    losses = [get_method(c).loss(NETWORKS, sample, get_alphas_cumprod(), c, "epsilon") for c in (CONFIG, config)]
    weights = torch.tensor([min(ABAR[t] / (1 - ABAR[t]), 5.0) for t in sample.t.tolist()], dtype=torch.float64)
    torch.testing.assert_close(losses[1], losses[0] * weights)


def test_noise_offset_moves_whole_channels():
    eps = draw_noise(torch.Size((64, 4, 16, 16)), MethodConfig(noise_offset=2.0), torch.Generator().manual_seed(0))
    plain = draw_noise(torch.Size((64, 4, 16, 16)), MethodConfig(), torch.Generator().manual_seed(0))
    offsets = eps - plain
    torch.testing.assert_close(offsets, offsets[:, :, :1, :1].expand_as(offsets), rtol=0, atol=1e-5)
    assert float(offsets[:, :, 0, 0].std()) == pytest.approx(2.0, rel=0.15)


def test_the_jump_from_zero_terminal_snr_is_exact():
    """At t = 999 the signal is 2e-4 of the sample: rounding in x0 = (x - eps) / 2e-4 must not show in x_s."""
    schedule = NoiseSchedule(get_alphas_cumprod(zero_terminal_snr=True))
    sample = _sample(replace(CONFIG, w_min=7, w_max=7))
    sample = replace(sample, t=torch.full((5,), 999), s=torch.full((5,), 979))
    jumps = []
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4)).to(dtype)
        teacher = lambda x, t, c, w, dtype=dtype: x.to(dtype).mul(0.5).cos()  # noqa: E731
        jumps.append(teacher_jump(teacher, x, sample, schedule.alphas_cumprod, CONFIG, "v_prediction").double())
    torch.testing.assert_close(jumps[1], jumps[0], rtol=0, atol=2e-6)


def test_a_fractional_timestep_has_the_alphas_cumprod_that_samplers_use():
    t = torch.tensor([0.0, 17.5, 998.0, 999.0], dtype=torch.float64)
    expected = torch.tensor([_abar(float(v)) for v in t], dtype=torch.float64)
    torch.testing.assert_close(at(get_alphas_cumprod(), t).flatten(), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "magic"}, "unknown method 'magic'"),
        ({"loss": "l3"}, "unknown loss 'l3'"),
        ({"weighting": "heavy"}, "unknown weighting 'heavy'"),
        ({"timestep_sampling": "odd"}, "unknown timestep_sampling 'odd'"),
        ({"original_steps": 1001}, "original_steps=1001"),
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"kind": "segmented", "phases": 51}, "phases=51"),
        ({"kind": "dmd2", "phases": 0}, "phases=0"),
        ({"kind": "tcd", "clean_share": 1.5}, r"clean_share=1\.5 must be 0 to 1"),
    ],
)
def test_a_wrong_setting_is_named(change, words):
    config = replace(CONFIG, **change)
    with pytest.raises(InputError, match=words):
        get_method(config).loss(NETWORKS, _sample(config), get_alphas_cumprod(), config, "epsilon")
