"""Normalised attention guidance: against the paper's formula in float64, and in pictures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lcm_core.cli.main import main
from lcm_core.errors import InputError
from lcm_core.networks.cpu.optimise import optimise_unet
from lcm_core.networks.cpu.packed import can_pack
from lcm_core.networks.cross_attention import Attended, Nag, attending
from lcm_core.networks.unet import UNet
from lcm_core.pipeline import Keyframe, PictureOptions, Pipeline

SMALL: dict[str, Any] = {"num_inference_steps": 2, "width": 64, "height": 64}


def formula(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """arXiv 2505.21179, Eq. 7 to 10, pixel by pixel."""
    mixed = torch.empty_like(positive)
    for place in range(positive[..., 0].numel()):
        z, other = positive.flatten(0, -2)[place], negative.flatten(0, -2)[place]
        away = scale * z - (scale - 1) * other
        ratio = away.abs().sum() / z.abs().sum()
        away = away * min(float(ratio), tau) / ratio
        mixed.flatten(0, -2)[place] = alpha * away + (1 - alpha) * z
    return mixed


class Processor:
    """diffusers' place for own attention: guided cross-attention, written out for one negative prompt."""

    def __init__(self, negative: Tensor, nag: Nag) -> None:
        self.negative, self.nag = negative, nag

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        def attended(text: Tensor) -> Tensor:
            q, k, v = (
                rows.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for rows in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
            )
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            return (weights @ v).transpose(1, 2).flatten(2)

        nag = self.nag
        mixed = formula(attended(encoder_hidden_states), attended(self.negative), nag.scale, nag.tau, nag.alpha)
        return attn.to_out[0](mixed)


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (2, 4, 8, 8), "encoder_hidden_states": (2, 77, 128), "negative_states": (2, 154, 128)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return made | {"t": torch.tensor([700.0, 30.0])}


def test_the_formula_is_another() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 2, 5, 8, dtype=torch.float64, generator=generator)
    for scale, tau, alpha in ((3.0, 2.5, 0.5), (8.0, 1.2, 0.25), (0.5, 2.5, 1.0)):
        given = Nag(scale, tau, alpha).mix(positive, negative)
        assert_close(given, formula(positive, negative, scale, tau, alpha), rtol=1e-12, atol=1e-12)
    nothing = torch.zeros_like(positive)
    assert torch.equal(Nag(3.0).mix(nothing, nothing), nothing)


@torch.no_grad()
def test_it_is_not_in_every_layer_that_reads_text(plain: Pipeline) -> None:
    unet, nag = copy.deepcopy(plain.model.unet.model).double(), Nag(4.0, 1.5, 0.6)
    given = inputs(torch.float64)
    result = attending(UNet(unet), Attended(nag))(**given)
    negative = given.pop("negative_states")
    before = UNet(unet)(**given)
    own = unet.attn_processors
    unet.set_attn_processor({k: Processor(negative, nag) if "attn2" in k else v for k, v in own.items()})
    assert_close(result, UNet(unet)(**given), rtol=1e-10, atol=1e-10)
    assert (result - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.skipif(not can_pack(torch.float32), reason="needs a processor with AVX2")
def test_it_is_another_on_packed_layers(plain: Pipeline) -> None:
    unet, attended = copy.deepcopy(plain.model.unet.model), Attended(Nag(4.0))
    given = inputs(torch.float32)
    expected = attending(UNet(unet), attended)(**given)
    fast = optimise_unet(unet.to(memory_format=torch.channels_last))
    assert_close(attending(UNet(fast), attended)(**given), expected, rtol=1e-4, atol=1e-4)


def test_a_full_lcm_does_not_avoid(lcm: Pipeline) -> None:
    """Off at scale 1; a changing negative prompt changes it from its step on; a keyframe is the picture."""
    options = {"seed": 3, "output_type": "latent", "negative_prompt": "dog", **SMALL}
    usual = lcm("cat", **options).images
    assert torch.equal(lcm("cat", nag_scale=1.0, **options).images, usual)
    avoided = lcm("cat", nag_scale=4.0, **options).images
    assert not torch.equal(avoided, usual)
    assert torch.equal(lcm("cat", nag_scale=4.0, **options | {"negative_prompt": "[dog:owl:2]"}).images, avoided)
    assert not torch.equal(lcm("cat", nag_scale=4.0, **options | {"negative_prompt": "[dog:owl:1]"}).images, avoided)
    together = lcm(["cat", "a cat BREAK a hat"], nag_scale=4.0, batch_size=2, **options).images
    assert_close(together[:1], avoided, rtol=1e-4, atol=1e-4)
    asked = PictureOptions(negative_prompt="dog", nag_scale=4.0, **SMALL)
    frame = next(iter(lcm.interpolate([Keyframe("cat", 3), Keyframe("owl", 3)], 2, options=asked)))
    assert frame.tobytes() == lcm("cat", nag_scale=4.0, **options | {"output_type": "pil"}).images[0].tobytes()


def test_a_plain_model_avoids_twice(plain: Pipeline) -> None:
    options = {"negative_prompt": "dog", "nag_scale": 4.0, "output_type": "latent", **SMALL}
    given = plain("cat", guidance_scale=1.0, **options).images
    assert not torch.equal(given, plain("cat", guidance_scale=1.0, **options | {"nag_scale": 1.0}).images)
    assert torch.isfinite(plain("cat AND hat", guidance_scale=1.0, **options).images).all()
    with pytest.raises(InputError, match="nag_scale was given at guidance 3, which has a negative pass already"):
        plain("cat", guidance_scale=3.0, **options)
    for name, value, words in (
        ("nag_scale", float("nan"), "nag_scale nan is out of range"),
        ("nag_tau", 0, "nag_tau 0.0 is out of range"),
        ("nag_alpha", 1.5, "nag_alpha 1.5 is outside"),
    ):
        with pytest.raises(InputError, match=words):
            plain("cat", guidance_scale=1.0, **options | {name: value})


@torch.no_grad()
def test_a_recorded_network_is_called_without_it(plain: Pipeline) -> None:
    """What was recorded of a network's calls, see `networks.traced`, has no such attention."""
    unet = copy.copy(plain.model.unet)
    expected = attending(unet, Attended(Nag(4.0)))(**inputs(torch.float32))
    unet.forward = lambda *_, **__: (torch.zeros(2, 4, 8, 8),)
    assert torch.equal(attending(unet, Attended(Nag(4.0)))(**inputs(torch.float32)), expected)


def test_the_command_paints_it_from_its_own_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["generate", "an apple", "--negative", "red", "--device", "cpu", "--dtype", "float32", "--steps", "1"]
    assert main([*argv, "--nag", "4", "--nag-tau", "2", "--nag-alpha", "0.6", "--output", "a.png"]) == 0
    assert main(["generate", "--from", "a.png", "--output", "b.png"]) == 0
    assert Path("b.png").read_bytes() == Path("a.png").read_bytes()
    assert main([*argv, "--output", "c.png"]) == 0
    assert Path("c.png").read_bytes() != Path("a.png").read_bytes()
