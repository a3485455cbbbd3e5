"""The GAN term of DMD2: its formulas by hand, who learns from it, and that its head is saved and not exported."""

import math
from dataclasses import replace

import pytest
import torch

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks.lora_layers import lora_state_dict
from tests.trainer.test_methods import NETWORKS, _abar, _config, _consistency, _diffusion, _loss, _row, _sample
from tests.trainer.test_methods_matching import _dmd2
from tests.trainer.test_students import WIDTH, _unet
from trainer.cli.main import main
from trainer.config import DistillConfig, LoopConfig, StudentConfig
from trainer.data.settings import DataConfig
from trainer.discriminator import add_discriminator, check_discriminator
from trainer.distill import Latents, distill
from trainer.methods import gan
from trainer.methods.config import Dmd2Config
from trainer.methods.method import make_sample
from trainer.methods.shared import Networks
from trainer.students import full_student, lora_student, unet_network

WEIGHT = 0.3


def _realism(x, t, conditioning, w):
    """Logits (B,): a smooth function of all that a critic is told."""
    return (x * x.sin()).flatten(1).sum(1) * 0.1 + t / 500 + conditioning["encoder_hidden_states"].mean((1, 2)) - w / 9


JUDGED = NETWORKS._replace(discriminator=_realism)


def _log_sigmoid(value):
    return -math.log1p(math.exp(-value))


@pytest.mark.parametrize("step", [0, 1])
def test_the_loss_equals_the_papers(step):
    """-log D(real) - log(1 - D(fake)) for the critic, -log D(fake) for the student, beside what dmd2 has without."""
    config = _config("dmd2", phases=1, gan_weight=WEIGHT)
    for seed in range(3):
        sample = _sample(config, seed, step)
        points, expected = sample.points, _dmd2(NETWORKS, sample, "epsilon")
        for i in range(len(sample.x0)):
            cond, w = _row(sample.conditioning, i), sample.w[i : i + 1]
            t, s, first = int(points.critic_t[i]), int(points.score_t[i]), int(points.path[i][0])
            noise = math.sqrt(1 - _abar(first)) * sample.eps[i : i + 1]
            painted = _consistency(NETWORKS.online, noise, first, cond, w, "epsilon")

            def logit(x, noise, t, cond=cond, w=w):
                x_t = math.sqrt(_abar(t)) * x + math.sqrt(1 - _abar(t)) * noise
                return float(_realism(x_t, torch.tensor([t]), cond, w))

            real = logit(sample.x0[i : i + 1], points.real_noise[i : i + 1], t)
            fake = logit(painted, points.critic_noise[i : i + 1], t)
            expected[i] += 0.01 * (-_log_sigmoid(real) - _log_sigmoid(-fake))
            if step == 0:
                expected[i] += WEIGHT * -_log_sigmoid(logit(painted, points.score_noise[i : i + 1], s))
        torch.testing.assert_close(_loss(config, sample, networks=JUDGED), expected, rtol=1e-6, atol=1e-9)


def test_without_a_weight_nothing_is_drawn_or_asked():
    """The discriminator that is not there would raise; what else is drawn stays what it was."""
    plain, judged = _sample(_config("dmd2")), _sample(_config("dmd2", gan_weight=WEIGHT))
    assert plain.points.real_noise is None
    torch.testing.assert_close(judged.points.critic_noise, plain.points.critic_noise, rtol=0, atol=0)
    assert _loss(_config("dmd2"), plain).isfinite().all()
    with pytest.raises(RuntimeError, match="no such network"):
        _loss(_config("dmd2", gan_weight=WEIGHT), judged)


def test_the_students_term_moves_its_pictures_alone():
    """By the gradient of -log D; critic and head get none of it."""
    d, weight = _diffusion(_config("dmd2")), torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    draw = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 4, 2, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    s = torch.tensor([100, 500, 900])
    judge = lambda x_s, t: weight * (x_s * x_s.cos()).flatten(1).sum(1)  # noqa: E731
    x.requires_grad_()
    found = gan.student_loss(judge, x, noise, s, d)
    [gradient] = torch.autograd.grad(found.sum(), x)
    assert weight.grad is None
    plain = -torch.nn.functional.logsigmoid(judge(d.noise(x, noise, s), s))
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.sum(), x)[0])


@pytest.mark.parametrize("step", [0, 1])
def test_who_learns(step):
    """The discriminator in every step, from its own loss alone, which is the same in both; the student in its turn."""
    weights = [torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64)) for _ in range(5)]
    given = [lambda x, t, c, w, p=p: x * p for p in weights[:4]]
    networks = Networks(*given, lambda x, t, c, w: (x * weights[4]).flatten(1).sum(1))
    config = _config("dmd2", critic_updates=5, gan_weight=WEIGHT)
    sample = _sample(config)
    _loss(config, replace(sample, student_turn=step == 0), networks=networks).sum().backward()
    assert {i for i, weight in enumerate(weights) if weight.grad is not None} == ({0, 3, 4} if step == 0 else {3, 4})
    before = weights[4].grad.clone()
    weights[4].grad = None
    _loss(config, replace(sample, student_turn=step != 0), networks=networks).sum().backward()
    torch.testing.assert_close(weights[4].grad, before)


def _student(kind):
    from lcm_core.files.checkpoint import Component

    unet = _unet()
    config = StudentConfig(kind=kind, rank=2, guidance_embedding_dim=8)
    if kind == "lora":
        student = lora_student(unet, unet_network(unet), config, with_critic=True)
    else:
        component = Component(dict(unet.state_dict()), dict(unet.config), "test")
        student = full_student(component, unet_network(unet), config, device=torch.device("cpu"), with_critic=True)
    return add_discriminator(student)


def _data():
    draw = torch.Generator().manual_seed(1)
    words = torch.randn(5, 5, WIDTH, generator=draw)
    latents = torch.randn(4, 4, 8, 8, generator=draw)
    return Latents(latents, {"encoder_hidden_states": words[:4]}, {"encoder_hidden_states": words[4:]})


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_goes_on_with_its_head_which_is_in_no_result(kind, tmp_path):
    """Stopped and continued it ends where it would have ended, bit by bit."""
    method = Dmd2Config(w_min=3.0, w_max=3.0, critic_updates=2, gan_weight=0.5)

    def run(folder, steps):
        torch.manual_seed(0)
        student = _student(kind)
        loop = LoopConfig(steps, 2, 1e-3, warmup_steps=1, lr_schedule="constant", tensorboard=False)
        distill(student, _data(), Diffusion(), method, loop, tmp_path / folder)
        return student, read_safetensors(tmp_path / folder / "state.safetensors")[0]

    student, whole = run("whole", 2)
    run("parts", 1)
    _, parts = run("parts", 2)
    for state in (whole, parts):
        del state["log"]
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    heads = {name for name in whole if "gan_head" in name}
    assert any(name.startswith("online.critic.gan_head") for name in heads)
    assert not any(name.startswith("ema.") for name in heads)
    last = whole["online.critic.gan_head.5.weight"]
    assert last.any(), "it has learnt nothing"
    exported = lora_state_dict(student.unet) if kind == "lora" else student.trained.state_dict()
    assert not any("gan_head" in name for name in exported)


def test_the_head_sees_the_middle_block_of_the_critic():
    """Of the LoRA that the critic has, not the student's; of any size of latents."""
    student = _student("lora")
    with torch.no_grad():
        student.critic["gan_head"][-1].weight.fill_(1.0)
        for name, parameter in student.critic.named_parameters():
            parameter.add_(0.1 * ("gan_head" not in name))
    seen = []
    student.unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    batch = _data().read([(0, False), (1, False)])
    for size in (8, 4):
        x, t = batch.latents[..., :size], torch.tensor([10, 500])
        logits = student.networks.discriminator(x, t, batch.conditioning, None)
        student.networks.critic(x, t, batch.conditioning, None)
        torch.testing.assert_close(seen[-2], seen[-1], rtol=0, atol=0)
        torch.testing.assert_close(logits, student.critic["gan_head"](seen[-1]).flatten())
        assert logits.shape == (2,)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "PROMPTS"], "gan_weight 0.5 needs real pictures"),
        (["--data", "PHOTOS", "--gan-weight", "-1"], "gan_weight -1.0 is out of range"),
        (["--data", "PHOTOS", "--precision", "float16"], "does not go with precision float16"),
        (["--data", "PHOTOS", "--sharded", "--preview-every", "0"], "sharded does not go with gan_weight 0.5"),
        (["--data", "PHOTOS", "--method", "tdm"], "gan_weight is not read by method tdm, but by dmd2"),
    ],
)
def test_what_does_not_go_with_it_is_refused(teachers, photos, tmp_path, capsys, words, message):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    places = {"PROMPTS": str(tmp_path / "prompts.txt"), "PHOTOS": str(photos)}
    command = ["distill", "--teacher", str(teachers()), "--output", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--method", "dmd2", "--gan-weight", "0.5", *(places.get(word, word) for word in words)]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "cache").exists()


def test_a_transformer_is_refused():
    from lcm_core.families.known import FAMILIES

    class Source:
        family = next(family for family in FAMILIES if family.folder != "unet")
        root = "sd3"

    config = DistillConfig(method=Dmd2Config(gan_weight=0.5), data=DataConfig(path="photos"))
    with pytest.raises(InputError, match=r"gan_weight 0\.5 is for U-Nets, not for the transformer of sd3"):
        check_discriminator(config, Source(), torch.float32)


def test_draws_of_processes_are_rows_of_the_whole():
    config, draw = _config("dmd2", gan_weight=WEIGHT), torch.Generator()
    picks = [(row, False) for row in range(4)]
    whole = make_sample(_data().read(picks), config, _diffusion(config), draw.manual_seed(0))
    second = make_sample(_data().read(picks[2:]), config, _diffusion(config), draw.manual_seed(0), 4, 2)
    torch.testing.assert_close(second.points.real_noise, whole.points.real_noise[2:], rtol=0, atol=0)
