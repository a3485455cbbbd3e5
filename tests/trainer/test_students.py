"""Students on tiny U-Nets of Stable Diffusion 1.x, 2.x and XL in shape."""

from dataclasses import replace

import pytest
import torch

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.errors import InputError
from lcm_core.files.checkpoint import Component
from lcm_core.networks.lora_layers import lora_state_dict
from trainer.config import StudentConfig
from trainer.data.cache import Batch
from trainer.methods.config import Dmd2Config, LcdConfig, method_config
from trainer.methods.method import get_method, make_sample
from trainer.methods.shared import Sample
from trainer.students import full_student, lora_student, unet_network

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
    for output in _outputs(student, (sample.x0, T, sample.conditioning, sample.w)):
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("method", ["lcd", "finetune", "tcd", "segmented", "dmd2", "tdm"])
def test_every_kind_of_teacher_can_be_learnt_from(kind, family, method):
    """A step changes the online student alone: not the target, not the teacher, not the critic."""
    student, sample = _student(kind, family), _sample(family, method_config(method))
    args = sample.x0, T, sample.conditioning, sample.w
    before = _outputs(student, args)
    optimizer = torch.optim.SGD(student.trained.parameters(), lr=1.0)
    _loss(student, sample, "v_prediction", method).backward()
    optimizer.step()
    online, target, teacher, critic = _outputs(student, args)
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
    before = _outputs(student, args)
    _loss(student, sample, method="dmd2").backward()
    torch.optim.SGD(student.critic.parameters(), lr=1.0).step()
    after = _outputs(student, args)
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
    torch.testing.assert_close(_outputs(student, args), expected)


def _outputs(student, args):
    """Of the online student, the target, the teacher and the critic."""
    return tuple(network(*args).detach() for network in student.networks[:4])


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
