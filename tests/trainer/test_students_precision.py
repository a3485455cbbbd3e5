"""Guidance, averages, number formats and gradients of students on tiny U-Nets."""

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
from tests.trainer.test_students import CPU, T, _loss, _sample, _student, _unet
from trainer.config import LoopConfig, StudentConfig
from trainer.distill import Latents, distill
from trainer.methods.config import Dmd2Config, LcdConfig
from trainer.students import choose_precision, lora_student, prepare_unet, unet_network


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
