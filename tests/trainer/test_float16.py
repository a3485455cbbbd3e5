"""float16, for GPUs without bfloat16: gradients that would be rounded to zero are kept, overflows left out."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.errors import InputError
from lcm_core.files.safetensors import read_safetensors
from lcm_core.networks.lora_layers import lora_state_dict
from tests.trainer.test_students import _conditioning, _unet
from trainer.config import LoopConfig, StudentConfig
from trainer.distill import Latents, distill
from trainer.loop import train
from trainer.methods.config import LcdConfig
from trainer.students import choose_precision, lora_student, unet_network

CPU = torch.device("cpu")
LOOP = LoopConfig(steps=8, batch_size=1, learning_rate=0.1, warmup_steps=0, cooldown=0.0, weight_decay=0.0)


def halved(folder, factor, scales_loss, steps=8, stop_at=None):
    """A weight whose gradient goes through float16, where it is `factor`."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    ema = copy.deepcopy(model).requires_grad_(False)

    def loss_fn(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        return (model.weight.half().float() * factor).sum()

    train(model, loss_fn, replace(LOOP, steps=steps), folder, ema, scales_loss=scales_loss)
    return model.weight.item()


def test_a_gradient_below_float16_is_kept(tmp_path):
    assert halved(tmp_path / "plain", 2e-8, scales_loss=False) == 1.0  # rounded to zero: nothing is learnt
    assert halved(tmp_path / "scaled", 2e-8, scales_loss=True) < 0.6


def test_steps_whose_gradient_overflows_are_left_out_until_the_scale_fits(tmp_path):
    """Scaled by 65,536, a gradient of 3 is too large for float16; at 16,384 it fits, two steps later."""
    assert halved(tmp_path, 3.0, scales_loss=True) == pytest.approx(1.0 - 6 * 0.1, abs=1e-3)
    assert read_safetensors(tmp_path / "state.safetensors")[0]["loss_scale"].tolist() == [16384.0, 6.0]


def test_the_scale_goes_on_where_it_was(tmp_path):
    whole = halved(tmp_path / "whole", 3.0, scales_loss=True)
    with pytest.raises(KeyboardInterrupt):
        halved(tmp_path / "parts", 3.0, scales_loss=True, stop_at=4)
    assert halved(tmp_path / "parts", 3.0, scales_loss=True) == whole
    states = [read_safetensors(tmp_path / name / "state.safetensors")[0] for name in ("whole", "parts")]
    torch.testing.assert_close(states[0]["loss_scale"], states[1]["loss_scale"], rtol=0, atol=0)


def test_what_overflows_at_any_scale_ends_the_run(tmp_path):
    with pytest.raises(InputError, match="loss became inf at step 16"):
        halved(tmp_path, float("inf"), scales_loss=True, steps=40)


def test_a_lora_of_a_float16_network_learns_what_one_of_float32_learns(tmp_path):
    results = []
    for dtype in (torch.float32, torch.float16):
        unet = _unet().to(dtype)
        torch.manual_seed(1)
        student = lora_student(unet, unet_network(unet, dtype), StudentConfig(rank=2))
        student = replace(student, scales_loss=dtype == torch.float16)
        latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        data = Latents(latents, _conditioning("sd1", 4), _conditioning("sd1", 1, 1))
        loop = LoopConfig(steps=4, batch_size=4, learning_rate=1e-2, warmup_steps=0)
        distill(student, data, Diffusion(), LcdConfig(w_min=1, w_max=1), loop, tmp_path / str(dtype))
        results.append(torch.cat([value.flatten() for value in lora_state_dict(unet, ema=True).values()]))
    exact, half = (result - results[0].mean() for result in results)
    assert float((exact - half).norm() / exact.norm()) < 0.05


def test_float16_needs_a_scaled_loss():
    assert choose_precision(CPU, "fp16", 1000, scales_loss=True) == torch.float16
    with pytest.raises(InputError, match="overflows in distillation"):
        choose_precision(CPU, "fp16", 1000)
