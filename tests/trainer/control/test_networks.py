"""Teacher, student and critic are asked with a ControlNet, T2I-Adapter or IP-Adapter as diffusers asks."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from lcm_core.networks.control import load_control
from lcm_core.networks.unet import UNet
from tests.core.references import diffusers_pipeline
from tests.trainer.conftest import WIDTH, build_unet
from tests.trainer.control.models import first_rows, make_controlnet, make_t2i
from trainer.config import StudentConfig
from trainer.control import AttendingUNet, ControlledUNet
from trainer.data.cache import prepare
from trainer.data.settings import DataConfig
from trainer.data.teacher import Teacher
from trainer.methods.shared import Sample
from trainer.students import lora_student, to_network


@pytest.mark.parametrize("role", ["online", "teacher", "critic", "target"])
def test_each_part_is_asked_as_diffusers_asks(controlnet, role):
    """The teacher with both halves of its guidance, which the control sees with their own text."""
    control, unet, plain = make_controlnet(), build_unet(), build_unet()
    call = UNet(unet)
    asked = ControlledUNet(call, load_control(controlnet, call, "teacher"), 0.7)
    student = lora_student(unet, to_network(asked), StudentConfig(rank=2), with_critic=True)
    x, hint, text = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 64, 64), torch.randn(2, 7, WIDTH)
    t, null, w = torch.tensor([19, 779]), torch.randn(2, 7, WIDTH), torch.tensor([1.5, 3.0])
    parts = {"x0": x, "eps": x, "points": None, "w": w}
    words = ({"encoder_hidden_states": states, "hint": hint} for states in (text, null))
    networks = student.networks.given(Sample(**parts, conditioning=next(words), null_conditioning=next(words)))

    def theirs(states):
        down, middle = control(x, t, states, hint, conditioning_scale=0.7, return_dict=False)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return plain(x, t, states, **added).sample

    with torch.no_grad():
        expected = theirs(text)
        assert float((expected - plain(x, t, text).sample).abs().max()) > 1e-2
        if role == "teacher":
            expected = expected + w.view(2, 1, 1, 1) * (expected - theirs(null))
        assert_close(getattr(networks, role)(x, t), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_adapter_sees_the_picture_in_grey_or_in_colour(tmp_path, channels):
    network, unet = make_t2i(channels), build_unet()
    network.save_pretrained(tmp_path)
    x, hint, text, t = (
        torch.randn(2, 4, 8, 8),
        torch.rand(2, 3, 64, 64),
        torch.randn(2, 7, WIDTH),
        torch.tensor([9, 99]),
    )
    call = UNet(unet)
    asked = ControlledUNet(call, load_control(tmp_path, call, "teacher"), 0.7)
    seen = hint if channels == 3 else (0.299 * hint[:, 0] + 0.587 * hint[:, 1] + 0.114 * hint[:, 2]).unsqueeze(1)
    with torch.no_grad():
        features = [0.7 * feature for feature in network(seen)]
        expected = unet(x, t, text, down_intrablock_additional_residuals=features).sample
        assert_close(asked(x, t, encoder_hidden_states=text, hint=hint), expected, rtol=0, atol=1e-5)


def test_an_ip_adapter_sees_each_picture_as_diffusers_does(teachers, photos, adapter, tmp_path):
    """Teacher with both halves of its guidance, of which one sees nothing; the student sees the picture. The cache
    rounds what is seen to float16."""
    from transformers import CLIPImageProcessor

    cache = prepare(
        DataConfig(path=str(photos), resolution=64), Teacher(teachers(), control=str(adapter)), tmp_path, "cpu"
    )
    ((bucket, _),) = cache.buckets.items()
    batch = cache.read(first_rows(bucket, 2))
    unet = build_unet()
    call = UNet(unet)
    asked = AttendingUNet(call, load_control(adapter, call, teachers()), 0.7)
    student = lora_student(unet, to_network(asked), StudentConfig(rank=2))
    x, t, w = torch.randn(2, 4, 8, 8), torch.tensor([19, 779]), torch.tensor([1.5, 3.0])
    parts = {"x0": x, "eps": x, "points": None, "w": w}
    sample = Sample(**parts, conditioning=batch.conditioning, null_conditioning=batch.null_conditioning)
    networks = student.networks.given(sample)

    processor = CLIPImageProcessor(size=32, crop_size=32)
    pipe = diffusers_pipeline("StableDiffusionPipeline", teachers(), feature_extractor=processor)
    pipe.load_ip_adapter(adapter.parent, "", adapter.name, "image_encoder", local_files_only=True)
    pipe.set_ip_adapter_scale(0.7)
    seen = [
        pipe.prepare_ip_adapter_image_embeds([Image.open(photos / f"{number}.png")], None, "cpu", 1, True)[0]
        for number in range(2)
    ]

    def theirs(states, half):
        added = {"image_embeds": [torch.stack([embeds[half] for embeds in seen])]}
        return pipe.unet(x, t, states["encoder_hidden_states"], added_cond_kwargs=added).sample

    with torch.no_grad():
        positive, negative = theirs(batch.conditioning, 1), theirs(batch.null_conditioning, 0)
        plain = build_unet()(x, t, batch.conditioning["encoder_hidden_states"]).sample
        assert float((positive - plain).abs().max()) > 2e-2
        assert_close(networks.online(x, t), positive, rtol=0, atol=1e-3)
        guided = positive + w.view(2, 1, 1, 1) * (positive - negative)
        assert_close(networks.teacher(x, t), guided, rtol=0, atol=5e-3)
