"""Students on tiny U-Nets of Stable Diffusion 1.x, 2.x and XL in shape."""

import copy
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.errors import InputError
from lcm_core.files.checkpoint import Component
from lcm_core.networks.lora_layers import lora_state_dict, remove_lora
from trainer.config import LoopConfig, StudentConfig
from trainer.data.cache import Batch
from trainer.distill import Latents, distill
from trainer.methods.config import Dmd2Config, LcdConfig, method_config
from trainer.methods.method import get_method, make_sample
from trainer.methods.shared import Sample
from trainer.students import choose_precision, full_student, lora_student, prepare_unet, unet_network

WIDTH = 16
CPU = torch.device("cpu")
FAMILIES = {
    "sd1": {"attention_head_dim": 2},
    "sd2": {"attention_head_dim": (2, 2), "use_linear_projection": True},
    "sdxl": {
        "attention_head_dim": (2, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
    },
}


def _unet(family="sd1", **settings):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "cross_attention_dim": WIDTH,
            **FAMILIES[family],
            **settings,
        }
    )


def _conditioning(family, rows, seed=0):
    draw = torch.Generator().manual_seed(seed)
    conditioning = {"encoder_hidden_states": torch.randn(rows, 5, WIDTH, generator=draw)}
    if family == "sdxl":
        time_ids = torch.tensor([[1024.0, 768, 0, 16, 1024, 1024]]).expand(rows, -1)
        pooled = torch.randn(rows, 8, generator=draw)
        conditioning["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    return conditioning


T = torch.tensor([999, 600, 300, 20])


def _sample(family="sd1", method=LcdConfig(w_min=1, w_max=4), rows=4) -> Sample:  # noqa: B008
    latents = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = Batch(latents, _conditioning(family, rows), _conditioning(family, rows, 1))
    return make_sample(batch, method, Diffusion(), torch.Generator().manual_seed(2))


def _student(kind, family="sd1", config=StudentConfig(rank=2), with_average=True, with_critic=True, **settings):  # noqa: B008
    unet = _unet(family, **settings)
    torch.manual_seed(1)
    if kind == "lora":
        return lora_student(unet, unet_network(unet), config, with_average, with_critic)
    component = Component(unet.state_dict(), {**unet.config, "_class_name": "UNet2DConditionModel"})
    return full_student(component, unet_network(unet), config, torch.float32, CPU, with_average, with_critic)


def _loss(student, sample, kind="epsilon", method="lcd"):
    options = {"dmd2": {"phases": 2}, "tdm": {"phases": 2}, "segmented": {"phases": 2, "loss": "l2"}}
    config = method_config(method, **options.get(method, {"loss": "l2"}))
    return get_method(config).loss(student.networks, sample, Diffusion(prediction_type=kind), config).mean()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_new_student_paints_like_its_teacher_at_any_guidance(kind, family):
    student, sample = _student(kind, family), _sample(family)
    expected = _unet(family)(sample.x0, T, **sample.conditioning).sample
    for network in student.networks:
        torch.testing.assert_close(network(sample.x0, T, sample.conditioning, sample.w), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("method", ["lcd", "finetune", "tcd", "segmented", "dmd2", "tdm"])
def test_every_kind_of_teacher_can_be_learnt_from(kind, family, method):
    """A step changes the online student alone: not the target, not the teacher, not the critic."""
    student, sample = _student(kind, family), _sample(family, method_config(method))
    args = sample.x0, T, sample.conditioning, sample.w
    before = [network(*args).detach() for network in student.networks]
    optimizer = torch.optim.SGD(student.trained.parameters(), lr=1.0)
    _loss(student, sample, "v_prediction", method).backward()
    optimizer.step()
    online, target, teacher, critic = (network(*args).detach() for network in student.networks)
    assert not torch.equal(online, before[0])
    torch.testing.assert_close(target, before[1], rtol=0, atol=0)
    torch.testing.assert_close(teacher, before[2], rtol=0, atol=0)
    torch.testing.assert_close(critic, before[3], rtol=0, atol=0)


def test_a_lora_run_has_one_unet_in_memory():
    unet = _unet()
    student = lora_student(unet, unet_network(unet), StudentConfig(rank=2))
    frozen = {id(p) for p in unet.parameters()} - {id(p) for p in student.trained.parameters()}
    frozen -= {id(p) for p in student.average.parameters()}
    assert sum(p.numel() for p in unet.parameters() if id(p) in frozen) == sum(p.numel() for p in _unet().parameters())
    assert not any(p.requires_grad for p in unet.parameters() if id(p) in frozen)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_critic_learns_beside_the_student_and_without_it(kind):
    student, config = _student(kind), Dmd2Config(phases=2, w_min=1, w_max=4)
    sample = replace(_sample(method=config), student_turn=False)
    args = sample.x0, T, sample.conditioning, sample.w
    before = [network(*args).detach() for network in student.networks]
    _loss(student, sample, method="dmd2").backward()
    torch.optim.SGD(student.critic.parameters(), lr=1.0).step()
    after = [network(*args).detach() for network in student.networks]
    torch.testing.assert_close(after[:3], before[:3], rtol=0, atol=0)
    assert not torch.equal(after[3], before[3])
    assert all(p.grad is None for p in student.trained.parameters())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_student_starts_from_an_earlier_one_and_its_critic_from_the_teacher(kind):
    """dmd2 begins with a student of lcd; a critic that began there too would see no difference to the teacher."""
    earlier, unet, config = _student(kind), _unet(), StudentConfig(rank=2)
    with torch.no_grad():
        for parameter in earlier.trained.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    if kind == "lora":
        start = {key: value.clone() for key, value in lora_state_dict(earlier.unet).items()}
        student = lora_student(unet, unet_network(unet), config, with_critic=True, start=start)
    else:
        plain = {**unet.config, "_class_name": "UNet2DConditionModel"}
        start = Component(earlier.unet.state_dict(), {**plain, "time_cond_proj_dim": 256})
        teacher = Component(unet.state_dict(), plain)
        student = full_student(teacher, unet_network(unet), config, with_critic=True, start=start)
    sample = _sample()
    args = sample.x0, T, sample.conditioning, sample.w
    expected = earlier.networks.online(*args), earlier.networks.online(*args), *2 * (_unet_output(args),)
    torch.testing.assert_close(tuple(network(*args) for network in student.networks), expected)


def _unet_output(args):
    x, t, conditioning, _ = args
    return _unet()(x, t, **conditioning).sample


def test_a_start_of_another_shape_is_refused():
    earlier, unet = _student("lora", config=StudentConfig(rank=3)), _unet()
    with pytest.raises(InputError, match=r"is \(3, .*instead of \(2, .*give the rank"):
        lora_student(unet, unet_network(unet), StudentConfig(rank=2), start=lora_state_dict(earlier.unet))
    plain = {**unet.config, "_class_name": "UNet2DConditionModel"}
    teacher = Component(unet.state_dict(), plain)
    start = Component({**teacher.tensors, "conv_in.bias": torch.zeros(3)}, plain, "mine.safetensors")
    with pytest.raises(InputError, match=r"mine.safetensors is of another architecture .*conv_in.bias"):
        full_student(teacher, unet_network(unet), StudentConfig(), start=start)


def test_a_full_student_learns_to_read_guidance():
    student, sample = _student("full"), _sample()
    optimizer = torch.optim.Adam(student.trained.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        _loss(student, sample).backward()
        optimizer.step()
    online = student.networks.online
    outputs = [online(sample.x0, T, sample.conditioning, torch.full((4,), w)) for w in (0.0, 6.0)]
    assert not torch.allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_without_an_average_the_target_is_the_student(kind):
    student, sample = _student(kind, with_average=False), _sample()
    optimizer = torch.optim.SGD(student.trained.parameters(), lr=1.0)
    _loss(student, sample).backward()
    optimizer.step()
    args = sample.x0, T, sample.conditioning, sample.w
    torch.testing.assert_close(student.networks.target(*args), student.networks.online(*args), rtol=0, atol=0)
    assert student.average is None


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_checkpointing_does_not_change_the_gradients(kind):
    """Nor those of the critic, whose adapters are on while the student's are off."""
    gradients = []
    for checkpointing in (False, True):
        config = StudentConfig(rank=2, gradient_checkpointing=checkpointing)
        student, sample = _student(kind, config=config), _sample(method=Dmd2Config(phases=2))
        for network in (student.unet, student.critic) if kind == "full" else (student.unet,):
            prepare_unet(network, config, (8, 8))
        learning = [*student.trained.parameters(), *student.critic.parameters()]
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in learning:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        _loss(student, sample, method="dmd2").backward()
        gradients.append([p.grad for p in learning])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_bfloat16_teacher_answers_in_float32():
    """A rounded output would put bfloat16's steps into every target."""
    from lcm_core.networks.unet import load_unet

    unet = _unet()
    component = Component(unet.state_dict(), {**unet.config, "_class_name": "UNet2DConditionModel"})
    network = unet_network(load_unet(component, "cpu", torch.bfloat16), torch.bfloat16)
    sample = _sample()
    output = network(sample.x0, T, sample.conditioning, None)
    assert output.dtype == torch.float32
    assert not torch.equal(output, output.bfloat16().float())
    torch.testing.assert_close(output, unet(sample.x0, T, **sample.conditioning).sample, rtol=0.1, atol=0.05)


def test_precision():
    assert choose_precision(CPU, "auto", 1000) == torch.float32
    assert choose_precision(CPU, "bf16", 1000) == torch.bfloat16
    with pytest.raises(InputError, match=r"float16 overflows.*bfloat16"):
        choose_precision(CPU, "float16", 1000)


class _Host(nn.Module):
    """A network of a host's own, with other names and another way to be called."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(3, 3)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, timesteps, context):
        return self.conv1(x) + self.to_q(context).mean((1, 2)).view(-1, 1, 1, 1) + timesteps.view(-1, 1, 1, 1) / 1000


def _host_run(folder: Path, loop: LoopConfig, callback=None):
    torch.manual_seed(3)
    module = _Host()
    plain = copy.deepcopy(module)
    student = lora_student(module, lambda x, t, c, w: module(x, t.float(), c["context"]), StudentConfig(rank=1))
    draw = torch.Generator().manual_seed(0)
    data = Latents(
        torch.randn(6, 4, 5, 7, generator=draw),
        {"context": torch.randn(6, 2, 3, generator=draw)},
        {"context": torch.zeros(1, 2, 3)},
    )
    try:
        distill(student, data, Diffusion(), LcdConfig(), loop, folder, 0.2, callback)
    finally:
        tensors = lora_state_dict(module, ema=True)
        remove_lora(module)
        x = torch.randn(2, 4, 5, 7)
        args = x, torch.zeros(2), torch.zeros(2, 2, 3)
        torch.testing.assert_close(module(*args), plain(*args), rtol=0, atol=0)
    return tensors


HOST_LOOP = LoopConfig(steps=8, batch_size=4, learning_rate=1e-2, warmup_steps=1, save_every=1e9)


def test_a_host_trains_its_own_network_and_may_stop_it_from_any_thread(tmp_path):
    """Interrupted by an exception of its own, the same call continues; the result is that of an uninterrupted run."""
    whole = _host_run(tmp_path / "whole", HOST_LOOP)

    class HostStopped(Exception):
        pass

    def stop(step, loss):
        if step == 4:
            raise HostStopped

    caught = []

    def work():
        try:
            _host_run(tmp_path / "parts", HOST_LOOP, stop)
        except HostStopped as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert caught
    seen = []
    parts = _host_run(tmp_path / "parts", HOST_LOOP, lambda step, loss: seen.append(step))
    assert seen == [5, 6, 7]
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert any(bool(tensor.any()) for name, tensor in whole.items() if name.endswith("lora_up.weight"))


@pytest.mark.parametrize("accumulation", [2, 3, 4])
def test_accumulated_parts_give_the_same_result(accumulation):
    """Unequal parts too: 4 samples in 3 parts."""
    with tempfile.TemporaryDirectory() as folder:
        whole = _host_run(Path(folder) / "whole", HOST_LOOP)
        parts = _host_run(Path(folder) / "parts", replace(HOST_LOOP, accumulation=accumulation))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_dropped_captions_get_the_empty_prompt():
    conditioning = {"a": {"b": torch.arange(1.0, 401).view(400, 1)}}
    data = Latents(torch.zeros(400, 1, 1, 1), conditioning, {"a": {"b": torch.zeros(1, 1)}})
    values = data.read(data.draw(400, torch.Generator().manual_seed(0), 0.25)).conditioning["a"]["b"]
    assert int((values == 0).sum()) == pytest.approx(100, abs=30)
